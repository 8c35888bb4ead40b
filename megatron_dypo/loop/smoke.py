"""A smoke run (``run.smoke``): one step with random weights, which proves that a layout fits and runs on a machine."""

from __future__ import annotations

import logging

from megatron_dypo.loop.state import Run
from megatron_dypo.loop.train import begin, train_step
from megatron_dypo.parallel.collectives import gather_floats
from megatron_dypo.parallel.device import memory_bytes, peak_memory_gib

log = logging.getLogger("megatron_dypo")

_PARTS = (
    ("gen", "rollouts"),
    ("old_log_prob", "log π_old"),
    ("ref_log_prob", "log π_ref"),
    ("update_actor", "update"),
    ("refit", "refit"),
    ("step", "whole step"),
)
"""Parts of the step, each with its name in the verdict."""


def smoke(run: Run) -> None:
    """Make one step, save nothing, and log the verdict. Collective over the world.

    Raises:
        RunEnded: on all ranks: the step could not be made.
    """
    begin(run.progress, run.policy, run.evaluator, run.recorder, "the random weights")
    metrics = train_step(run.progress, run.collector, run.updater, run.evaluator, run.prober, run.recorder)
    peaks = [peak for (peak,) in gather_floats([peak_memory_gib()])]
    if run.ranks.is_global_leader:
        log.info(verdict(metrics, peaks, memory_bytes()))


def verdict(metrics: dict[str, float], peaks: list[float], memory: int | None) -> str:
    """Return one line about a smoke run's step.

    Args:
        metrics: of the step.
        peaks: peak memory of each rank, GiB.
        memory: bytes of a rank's GPU; None on a CPU.
    """
    times = [f"{words} {metrics[name]:.1f} s" for part, words in _PARTS if (name := f"timing_s/{part}") in metrics]
    rank = max(range(len(peaks)), key=peaks.__getitem__)
    capacity = f" of {memory / 2**30:.1f}" if memory is not None else ""
    skipped = "; the update was skipped: its gradients were not finite" if metrics.get("train/skipped") else ""
    return (
        f"smoke run: one step with random weights was made by {len(peaks)} ranks: {', '.join(times)}; "
        f"{metrics.get('train/num_tokens', 0):,.0f} tokens in the update; peak memory {peaks[rank]:.1f}{capacity} GiB, "
        f"on rank {rank}{skipped}"
    )
