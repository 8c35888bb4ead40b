"""Make one measurement in a process of its own: ``python -m tools.gpu_parts.part '{"what": …}'``.

Each precision needs its own process: Transformer Engine keeps FP8 state for the whole process, and an error on the GPU
makes the process unusable. The last line of the output is the result, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.parallel.groups import MeshRank, close
from tools.gpu_parts.logprob_speed import ProjectionSizes, measure_logprobs
from tools.gpu_parts.synthetic import CheckSizes


def machine() -> dict[str, Any]:
    """Return the name and generation of the device, and the FP8 recipes that it cannot run."""
    from megatron_dypo.mcore import features
    from megatron_dypo.parallel import device

    features.shield_imports()
    probed = features.probe()
    return {
        "device": device.device_name(),
        "on_gpu": device.on_gpu(),
        "num_gpus": device.num_gpus(),
        "compute_capability": device.compute_capability(),
        "memory_bytes": device.memory_bytes(),
        "toolkit": device.toolkit_version(),
        "features": str(probed),
        "fp8_obstacles": dict(probed.fp8_obstacles),
    }


def measure(layout: MeshRank, spec: dict[str, Any]) -> dict[str, Any]:
    """Make the measurement that ``spec`` asks for, on the process group that exists."""
    if spec["what"] == "logprobs":
        projection = ProjectionSizes(**spec["sizes"])
        return measure_logprobs(projection, getattr(torch, spec["dtype"]), layout.tp_group)
    if spec["what"] == "layout":
        from tools.gpu_parts.layout_scores import score_layout

        return score_layout(layout, Path(spec["model"]), spec["dtype"], ParallelConfig(**spec["parallel"]))
    sizes, fp8 = CheckSizes(**spec["sizes"]), Fp8Config(recipe=spec["recipe"])
    if spec["what"] == "resumed":
        from tools.gpu_parts.resumed import run_resumed

        root = Path(spec["root"])
        return run_resumed(sizes, layout, dtype=spec["dtype"], fp8=fp8, root=root, loads=spec["loads"])
    from tools.gpu_parts.updates import run_updates

    run = run_updates(sizes, layout, dtype=spec["dtype"], fp8=fp8, keep=Path(spec["keep"]))
    return dataclasses.asdict(run)


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["what"] == "machine":
        print(json.dumps(machine()))
        return
    layout = start_megatron(ParallelConfig(**spec.get("parallel", {})))
    result = measure(layout, spec)
    close(layout)
    if layout.rank == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
