"""The checkpoints that stay: the last ones, every M-th step, and the best by a metric."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.json_text import parse_json
from megatron_dypo.mcore.checkpoints.folder import (
    STATE,
    discard,
    remains,
    step_of,
    try_to_remove,
    whole_folders,
)

SCORES = "scores"
"""Key of the trainer's state: metric → value of the policy in the checkpoint, for ``checkpoint.keep_best``."""
log = logging.getLogger(__name__)


def prune(final: Path, cfg: CheckpointConfig) -> None:
    """Remove the checkpoints beside ``final``, the one just written, that no rule keeps, and remains of saves.

    Damaged checkpoints that were set aside are neither counted nor removed. What cannot be removed is named, and stays.
    """
    folders = {step_of(folder): folder for folder in whole_folders(final.parent)}
    scores = {step: score_of(folder, cfg.keep_best.metric) for step, folder in folders.items()}
    kept = kept_by(scores, cfg, newest=step_of(final))
    for step, folder in folders.items():
        if step not in kept:
            try_to_remove(folder, discard)
    for left in remains(final.parent):
        try_to_remove(left)


def kept_by(scores: Mapping[int, float | None], cfg: CheckpointConfig, *, newest: int) -> dict[int, list[str]]:
    """Return step → names of the rules that keep it: ``last``, ``every``, ``best``. Other steps are not kept.

    Steps above ``newest``, which were made before the run went back, count as older than those that lead to it.

    Args:
        scores: step of each checkpoint → value of the metric, None if it was not measured at that step.
        newest: the step that was saved last.
    """
    order = sorted(scores, key=lambda step: (step > newest, -step))
    kept = {step: ["last"] for step in (order[: cfg.keep] if cfg.keep else order)}
    for step in order if cfg.keep_every else ():
        if step % cfg.keep_every == 0:
            kept.setdefault(step, []).append("every")
    sign = 1 if cfg.keep_best.mode == "max" else -1
    measured = [(sign * value, step) for step, value in scores.items() if value is not None]
    if cfg.keep_best.metric is not None and measured:
        kept.setdefault(max(measured)[1], []).append("best")
    return kept


def score_of(checkpoint: Path, metric: str | None) -> float | None:
    """Return the value of a metric that a checkpoint was saved with; None if it has no finite one."""
    if metric is None:
        return None
    header = parse_json((checkpoint / STATE).read_bytes())
    trainer = header.get("trainer")
    scores = trainer.get(SCORES) if isinstance(trainer, dict) else None
    value = scores.get(metric) if isinstance(scores, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def scores_for(metrics: Mapping[str, float], cfg: CheckpointConfig, step: int) -> dict[str, float]:
    """Return the part of a step's metrics that its checkpoint keeps; say if the metric is not among them."""
    metric = cfg.keep_best.metric
    if metric is None:
        return {}
    if metric not in metrics:
        log.info(
            "checkpoint.keep_best.metric=%s: not measured at step %d; its checkpoint is not compared", metric, step
        )
        return {}
    return {metric: metrics[metric]}
