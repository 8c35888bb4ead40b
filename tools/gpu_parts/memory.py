"""The measured peak of the updates against the planner's count of the same tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.run import RunConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.planning.devices import GIB, GPUS, find_rates
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.setting import Assumptions, Setting
from tools.gpu_parts.synthetic import CheckSizes, Dtype, architecture

MEMORY_BAR = 0.15


def compare_memory(machine: Mapping[str, Any], sizes: CheckSizes, updates: Path) -> dict[str, Any]:
    """Compare the peak of the allocator with the plan, without what the plan adds for other users of the GPU.

    On a CPU the peak is that of the whole process, so there are numbers and no verdict.

    Raises:
        ValueError: the updates were not measured.
    """
    if not updates.is_file():
        raise ValueError(f"{updates} does not exist: run the stage updates first")
    series = json.loads(updates.read_text(encoding="utf-8"))["updates"]
    found: dict[str, Any] = {}
    verdicts = {}
    dtypes: tuple[tuple[str, Dtype], ...] = (("float32", "float32"), ("bf16", "bfloat16"))
    for name, dtype in dtypes:
        if "peak_gib" in series.get(name, {}):
            planned, measured = planned_gib(machine, sizes, dtype), series[name]["peak_gib"]
            found[name] = {"planned_gib": planned, "measured_gib": measured, "ratio": planned / measured}
            if machine["on_gpu"]:
                verdicts[f"{name}: within {MEMORY_BAR:.0%}"] = abs(planned / measured - 1) <= MEMORY_BAR
    return {"memory": found, "verdicts": verdicts}


def planned_gib(machine: Mapping[str, Any], sizes: CheckSizes, dtype: Dtype) -> float:
    """Return the planner's bytes of the updates' tensors, in GiB."""
    prompt = sizes.length // 4
    config = Config(
        run=RunConfig(dir="check", steps=sizes.steps),
        model=ModelConfig(hf_path="synthetic", dtype=dtype),
        data=DataConfig(prompts=("none",), max_prompt_tokens=prompt, max_trace_tokens=sizes.length - prompt),
        rollout=RolloutConfig(max_new_tokens=sizes.length - prompt),
        batching=BatchingConfig(tokens_per_microbatch=max(sizes.tokens // 2, sizes.length)),
    )
    setting = Setting(
        config=config,
        arch=architecture(sizes),
        gpu=find_rates(machine["device"]) or next(iter(GPUS.values())),
        gpus_per_node=1,
        trainer_gpus=1,
        num_servers=1,
        assumed=Assumptions(prompt_tokens=prompt, response_tokens=sizes.length - prompt),
        fused="Transformer Engine" in machine["features"],
        on_gpu=bool(machine["on_gpu"]),
    )
    (footprint,) = trainer_footprints(setting)
    terms = {term.name: term.bytes for term in footprint.terms}
    return sum(size for name, size in terms.items() if name not in ("reserved", "fragmentation")) / GIB
