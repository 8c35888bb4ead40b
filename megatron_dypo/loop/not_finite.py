"""The search for the parameter and the samples behind an update that is not finite. Called by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.policy import Policy, UpdateReport
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.types import Sample

log = logging.getLogger("megatron_dypo")

_SHOWN = 3


def require_finite_weights(policy: Policy, place: str) -> None:
    """Raise RunEnded on all ranks if a weight is not finite; ``place`` says where the weights come from."""
    if name := policy.bad_weight():
        raise RunEnded(Cause.NOT_FINITE, f"{place}: weight {name} holds a value that is not finite")


def count_update(
    progress: Progress, report: UpdateReport, policy: Policy, replica: Replica, ranks: Ranks, max_bad_steps: int
) -> RunEnded | None:
    """Count an update; return the end of the run if too many in a row were skipped or a weight is not finite."""
    if report.is_applied:
        progress.count_update(None)
        return None
    problem, has_bad_weights = explain_bad_update(policy, replica, ranks, report.samples)
    progress.count_update(problem)
    if ranks.is_global_leader:
        norm = report.metrics["train/grad_norm"]
        log.warning("step %d: gradient norm %s; update skipped: %s", progress.step, norm, problem)
    if not has_bad_weights and progress.bad_steps < max_bad_steps:
        return None
    skipped = "an update was" if progress.bad_steps == 1 else f"{progress.bad_steps} updates in a row were"
    return RunEnded(Cause.NOT_FINITE, f"step {progress.step}: {skipped} skipped: {problem}")


def explain_bad_update(policy: Policy, replica: Replica, ranks: Ranks, samples: Sequence[Sample]) -> tuple[str, bool]:
    """Name the first weight or gradient, and the first samples, that are not finite. Collective over the world.

    Args:
        samples: those of this replica's update, the same on each of its ranks.

    Returns:
        The reason in words, and whether a weight itself is not finite.
    """
    weight = policy.bad_weight()
    gradient = None if weight else policy.bad_gradient()
    if weight or gradient:
        where = f"weight {weight}" if weight else f"gradient of {gradient}"
    else:
        where = "only the norm of all gradients together"
    return f"the first that is not finite: {where}; {_bad_samples(policy, replica, ranks, samples)}", weight is not None


def _bad_samples(policy: Policy, replica: Replica, ranks: Ranks, samples: Sequence[Sample]) -> str:
    logprobs = policy.replica_logprobs(samples)
    bad = {s.order for s, logp_R in zip(samples, logprobs, strict=False) if not np.isfinite(logp_R).all()}
    found = ranks.of_leaders(
        ([(order, replica.id_of(order)) for order in sorted(bad)], len({s.order for s in samples}))
    )
    total = sum(count for _, count in found)
    names = dict(sorted(pair for pairs, _ in found for pair in pairs))
    if not names:
        return f"the log-probs of all {total} prompts of the update are finite"
    shown = ", ".join(list(names.values())[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"log-probs are not finite for {len(names)} of {total} prompts: {shown}{more}"
