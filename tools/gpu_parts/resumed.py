"""A policy that is saved and loaded in each precision, against the one that went on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.mcore.checkpoints.checkpoint import begin_save, load
from megatron_dypo.mcore.checkpoints.folder import folder_of
from megatron_dypo.parallel.groups import MeshRank
from tools.gpu_parts.precisions import precisions
from tools.gpu_parts.run_part import Part, PartError, run_part
from tools.gpu_parts.synthetic import CheckSizes, Dtype, make_samples
from tools.gpu_parts.updates import backward, build_policy, pack_samples, score

SIZES = CheckSizes(hidden=256, layers=2, head_dim=64, vocab=1024, tokens=2304, length=256)
GAP_BAR = 1e-3
"""Largest relative gap of losses and gradient norms. Attention adds its gradients in no fixed order on a GPU."""
_UPDATES_BEFORE, _UPDATES_AFTER = 3, 3


def compare_resumed(machine: Mapping[str, Any], work: Path, *, run_part: Part = run_part) -> dict[str, Any]:
    """Return precision → largest gap between the losses and norms after loading and those without; and the verdicts."""
    found: dict[str, Any] = {}
    verdicts = {}
    for precision in precisions(machine):
        root = work / "checkpoints" / precision.name
        shutil.rmtree(root, ignore_errors=True)
        spec = {"what": "resumed", "sizes": asdict(SIZES), "dtype": precision.dtype, "recipe": precision.recipe}
        try:
            series = [run_part({**spec, "root": str(root), "loads": loads})["series"] for loads in (False, True)]
        except PartError as error:
            found[precision.name] = {"error": str(error)}
            verdicts[f"{precision.name}: loads"] = False
            continue
        gap = max(abs(own / other - 1) for other, own in zip(*series, strict=True))
        found[precision.name] = {"went_on": series[0], "loaded": series[1], "gap": gap}
        verdicts[f"{precision.name}: goes on within {GAP_BAR:g}"] = gap <= GAP_BAR
    return {"resumed": found, "verdicts": verdicts}


def run_resumed(
    sizes: CheckSizes, layout: MeshRank, *, dtype: Dtype, fp8: Fp8Config, root: Path, loads: bool
) -> dict[str, Any]:
    """Make updates, save, and make more; or load what was saved, and make the same ones.

    Returns:
        ``series``: loss and gradient norm of each update after the checkpoint.
    """
    chunks, optimizer = build_policy(sizes, layout, dtype, fp8)
    samples = make_samples(sizes)
    rows = pack_samples(samples, score(chunks, samples, sizes, layout, fp8), sizes, layout, fp8)

    def update(count: int) -> list[float]:
        series = []
        for _ in range(count):
            optimizer.zero_grad()
            series += [backward(chunks, rows), float(optimizer.step().grad_norm)]
        return series

    if loads:
        load(folder_of(root, _UPDATES_BEFORE), chunks=chunks, optimizer=optimizer, layout=layout)
    else:
        update(_UPDATES_BEFORE)
        begin_save(root, _UPDATES_BEFORE, chunks=chunks, optimizer=optimizer, layout=layout, trainer_state={}).finish()
    return {"series": update(_UPDATES_AFTER)}
