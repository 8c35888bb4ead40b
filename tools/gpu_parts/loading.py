"""Make updates after a checkpoint, in the process that wrote it or in one that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.mcore.checkpoints.checkpoint import begin_save, load
from megatron_dypo.mcore.checkpoints.folder import folder_of
from megatron_dypo.parallel.groups import MeshRank
from tools.gpu_parts.synthetic import CheckSizes, Dtype, make_samples
from tools.gpu_parts.updates import backward, build_policy, pack_samples, score

_UPDATES_BEFORE, _UPDATES_AFTER = 3, 3


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
