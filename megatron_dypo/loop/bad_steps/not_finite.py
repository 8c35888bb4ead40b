"""The search for the parameter and the samples behind an update that is not finite. Called by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.bad_steps.dumper import Dumper
from megatron_dypo.loop.bad_steps.places import Place, bad_inputs, bad_logprobs, shown
from megatron_dypo.loop.policy import Policy, UpdateReport
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.mcore.checkpoints.verify import Verify
from megatron_dypo.objective.streams import Stream

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class BadSteps:
    """The rules for updates that are not finite."""

    policy: Literal["skip", "stop", "roll_back"]
    """See ``optimizer.on_bad_step``."""
    most_in_a_row: int
    """See ``optimizer.max_bad_steps``."""
    max_rollbacks: int
    """See ``optimizer.max_rollbacks``."""
    checkpoints: Path
    """The folder of all checkpoints."""
    verify: Verify
    """See ``checkpoint.verify``; of the checkpoint to go back to."""
    dumper: Dumper
    streams: Sequence[Stream]
    """The objective's, which the loss reads."""


def end_by_weights(policy: Policy, place: str) -> RunEnded | None:
    """Return the end of the run if a weight is not finite, the same on all ranks; ``place`` says where it was found."""
    name = policy.bad_weight()
    if name is None:
        return None
    return RunEnded(Cause.NOT_FINITE, f"{place}: weight {name} holds a value that is not finite")


def require_finite_weights(policy: Policy, place: str) -> None:
    """Raise RunEnded on all ranks if a weight is not finite; ``place`` says where the weights come from."""
    if end := end_by_weights(policy, place):
        raise end


def count_update(
    progress: Progress, report: UpdateReport, policy: Policy, replica: Replica, ranks: Ranks, rules: BadSteps
) -> RunEnded | None:
    """Count an update; return the end of the run if the rules ask for it or a weight is not finite.

    The microbatches behind a skipped update are dumped.
    """
    if report.is_applied:
        progress.count_update(None)
        return None
    problem, has_bad_weights = explain_bad_update(policy, replica, ranks, report, rules.streams)
    step = progress.step + 1
    dumped = rules.dumper.dump(step, report, policy, replica, ranks, problem=problem, has_bad_weights=has_bad_weights)
    problem = f"{problem}; {dumped}"
    progress.count_update(problem)
    if ranks.is_global_leader:
        norm = report.metrics["train/grad_norm"]
        log.warning("step %d: gradient norm %s; update skipped: %s", progress.step, norm, problem)
    allowed = 1 if rules.policy == "stop" else rules.most_in_a_row
    if not has_bad_weights and progress.bad_steps < allowed:
        return None
    skipped = "an update was" if progress.bad_steps == 1 else f"{progress.bad_steps} updates in a row were"
    return RunEnded(Cause.NOT_FINITE, f"step {progress.step}: {skipped} skipped: {problem}")


def explain_bad_update(
    policy: Policy, replica: Replica, ranks: Ranks, report: UpdateReport, streams: Sequence[Stream]
) -> tuple[str, bool]:
    """Name the first weight or gradient, and the first samples and tokens, that are not finite. Collective over the
    world.

    Returns:
        The reason in words, and whether a weight itself is not finite.
    """
    weight = policy.bad_weight()
    gradient = None if weight else policy.bad_gradient()
    if weight or gradient:
        where = f"weight {weight}" if weight else f"gradient of {gradient}"
    else:
        where = "only the norm of all gradients together"
    # A bad weight spoils the log-probs that the loss reads, too.
    samples = _bad_samples(policy, replica, ranks, report, () if weight else streams)
    return f"the first that is not finite: {where}; {samples}", weight is not None


def _bad_samples(
    policy: Policy, replica: Replica, ranks: Ranks, report: UpdateReport, streams: Sequence[Stream]
) -> str:
    logprobs = bad_logprobs(report.samples, policy.replica_logprobs(report.samples))
    inputs = bad_inputs(report.samples, streams)
    orders = {place.order for places in (logprobs, *inputs.values()) for place in places}
    names = {order: replica.id_of(order) for order in orders}
    # The samples of a prompt may be on several replicas, which share the work.
    found = ranks.of_leaders((logprobs, inputs, names, {sample.order for sample in report.samples}))
    prompts = {order: name for _, _, own, _ in found for order, name in own.items()}
    total = len(set().union(*(own for _, _, _, own in found)))
    words = [_of_logprobs(sorted(place for own, _, _, _ in found for place in own), prompts, total)]
    for stream in streams:
        if places := sorted(place for _, own, _, _ in found for place in own.get(stream.name, [])):
            words.append(f"{stream.name}, which the loss reads, is not finite for {shown(places, prompts)}")
    return "; ".join(words)


def _of_logprobs(places: Sequence[Place], prompts: dict[int, str], total: int) -> str:
    if not places:
        return f"the log-probs of all {total} prompts of the update are finite"
    count = len({place.order for place in places})
    return f"log-probs are not finite for {count} of {total} prompts: {shown(places, prompts)}"
