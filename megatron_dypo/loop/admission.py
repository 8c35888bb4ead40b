"""What becomes of groups that came in: into the queues, or dropped for a reason; and the books of every draw.

Everything here works on the parts that a replica's leader holds; :func:`books` is collective.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.grading.verify import verdict_problem
from megatron_dypo.loop.ledger import Balance, Ledger, OpenDraws, balance
from megatron_dypo.loop.outcomes import count_verdicts
from megatron_dypo.loop.run import Leader, Run
from megatron_dypo.loop.tally import tally_dropped, tally_groups
from megatron_dypo.metrics.samples import SampleRow, dropped_row, sample_row
from megatron_dypo.objective.route import Routed, route
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.types import DropReason, GradedGroup, Treatment


def books(run: Run) -> Balance:
    """The books of all replicas together, held against what queues and streams hold. Collective; on leaders complete."""
    leader = run.leader
    if leader is None:
        return balance([])
    stream = leader.background
    if stream is None:
        mine = _own_books(run, leader, len(leader.unfinished))
    else:
        with stream.still():
            mine = _own_books(run, leader, len(leader.unfinished) + len(stream.unfinished()))
    return balance(gather_objects(mine, leader.group))


def _own_books(run: Run, leader: Leader, in_flight: int) -> tuple[Ledger, OpenDraws]:
    count_long_prompts(run, leader)
    waiting = len(leader.queues) + len(leader.queues.batch)
    return leader.ledger, OpenDraws(waiting=waiting, in_flight=in_flight)


def admit(run: Run, leader: Leader, graded: Sequence[GradedGroup], dropped: Sequence[DroppedGroup]) -> list[SampleRow]:
    """Put what can be learned from into the queues, enter the rest in the books; returns the rows of ``samples/``."""
    tally_groups(run.tally, graded)
    tally_dropped(run.tally, dropped)
    run.tally.extreme("max:epoch", max((group.prompt.visit for group in graded), default=0))
    count_long_prompts(run, leader)
    stale = [group for group in graded if _is_stale(run, group)]
    usable = [group for group in graded if (group.tier is not None or not group.rollouts) and group not in stale]
    run.tally.add("stale", len(stale))
    routed = route(usable, run.objective, step=run.step, version=run.step, seed=run.config.run.seed)
    for samples in filter(None, routed.samples):
        leader.queues.put(samples)
    reasons = [(reason, "") for reason in routed.reasons if reason is not None]
    reasons += [(DropReason.STALE, "") for _ in stale]
    reasons += [(DropReason.NO_VERDICT, problem) for problem in map(verdict_problem, graded) if problem]
    reasons += [(group.reason, group.message) for group in dropped]
    for reason, message in reasons:
        leader.ledger.drop(reason)
        leader.outcomes.drop(reason, message=message)
    leader.outcomes.graded += len(usable)
    leader.outcomes.verdicts += count_verdicts(graded, run.config.grading.fail_truncated)
    run.tally.add("hard_without_teacher", routed.without_teacher)
    for teacher, count in routed.teacher_counts().items():
        run.tally.add(f"teacher/{teacher}", count)
        run.tally.add("teachers", count)
    return _sample_rows(run.step + 1, usable, routed, leader) + _unused_rows(run.step + 1, graded, stale, dropped)


def _is_stale(run: Run, group: GradedGroup) -> bool:
    """Whether the oldest weights that sampled a graded group are too old for an update."""
    oldest = min((rollout.policy_version for rollout in group.rollouts), default=run.step)
    return group.tier is not None and run.step - oldest > run.config.batching.max_version_lag


def count_long_prompts(run: Run, leader: Leader) -> None:
    """Enter the prompts that draws left out for their length. A stream's thread adds to ``drops``."""
    while leader.drops:
        drops = leader.drops.popleft()
        leader.ledger.drop(DropReason.TOO_LONG, drops.prompts)
        leader.outcomes.drop(DropReason.TOO_LONG, drops.prompts)
        run.tally.add("dropped_prompts", drops.prompts)
        run.tally.add("dropped_traces", drops.traces)
        run.tally.add("wrong_traces", drops.wrong_traces)


def _sample_rows(step: int, groups: Sequence[GradedGroup], routed: Routed, leader: Leader) -> list[SampleRow]:
    rows = []
    pairs = zip(groups, routed.treatments, routed.teachers, routed.reasons, strict=True)
    for group, treatment, teacher, reason in pairs:
        trace = None if teacher is None else leader.tokenizer.decode(group.prompt.traces[teacher].tolist())
        rows.append(sample_row(step, group, treatment, teacher=teacher, trace=trace, dropped=reason))
    return rows


def _unused_rows(
    step: int, graded: Sequence[GradedGroup], stale: Sequence[GradedGroup], dropped: Sequence[DroppedGroup]
) -> list[SampleRow]:
    rows = [sample_row(step, group, Treatment.DROP, dropped=DropReason.STALE) for group in stale]
    for group in filter(verdict_problem, graded):
        rows.append(sample_row(step, group, Treatment.DROP, dropped=DropReason.NO_VERDICT))
    return rows + [dropped_row(step, group.prompt, group.reason) for group in dropped]
