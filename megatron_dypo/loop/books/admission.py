"""Admission: new groups wait for an update, or are dropped for a reason. Pure, except for a tally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dypo.grading.verify import verdict_problem
from megatron_dypo.loop.books.tally import Tally, tally_dropped, tally_groups
from megatron_dypo.metrics.samples import SampleRow, dropped_row, sample_row
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.route import Routed, route
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.types import DropReason, GradedGroup, Prompt, Treatment


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """Groups that came in together, sorted by what happens to them."""

    usable: Sequence[GradedGroup]
    """Groups that are graded or have no rollouts, and are not stale."""
    routed: Routed
    """Parallel to ``usable``."""
    stale: Sequence[GradedGroup]
    """Groups that were sampled by weights too old for an update."""
    unjudged: Sequence[GradedGroup]
    """Groups with a rollout that has no verdict."""
    dropped: Sequence[DroppedGroup]
    """Prompts without a group."""

    def drops(self) -> list[tuple[DropReason, str]]:
        """Return reason and message of each draw that came to nothing."""
        return [
            *((reason, "") for reason in self.routed.reasons if reason is not None),
            *((DropReason.STALE, "") for _ in self.stale),
            *((DropReason.NO_VERDICT, verdict_problem(group) or "") for group in self.unjudged),
            *((group.reason, group.message) for group in self.dropped),
        ]


def admit(
    graded: Sequence[GradedGroup],
    dropped: Sequence[DroppedGroup],
    objective: Objective,
    *,
    step: int,
    seed: int,
    max_version_lag: int,
) -> Admitted:
    """Decide for each group whether it waits for an update.

    Args:
        step: the optimizer step that collects; also the version of the weights that the servers hold.
        seed: of the draw of teachers.
        max_version_lag: versions that a group's oldest rollout may be behind.
    """
    stale = [group for group in graded if _is_stale(group, step, max_version_lag)]
    usable = [group for group in graded if (group.tier is not None or not group.rollouts) and group not in stale]
    return Admitted(
        usable=usable,
        routed=route(usable, objective, step=step, version=step, seed=seed),
        stale=stale,
        unjudged=[group for group in graded if verdict_problem(group)],
        dropped=dropped,
    )


def _is_stale(group: GradedGroup, version: int, max_version_lag: int) -> bool:
    oldest = min((rollout.policy_version for rollout in group.rollouts), default=version)
    return group.tier is not None and version - oldest > max_version_lag


def tally_admitted(tally: Tally, graded: Sequence[GradedGroup], admitted: Admitted) -> None:
    """Count new groups, and what happens to them."""
    tally_groups(tally, graded)
    tally_dropped(tally, admitted.dropped)
    tally.extreme("max:epoch", max((group.prompt.visit for group in graded), default=0))
    tally.add("stale", len(admitted.stale))
    tally.add("hard_without_teacher", admitted.routed.without_teacher)
    for teacher, count in admitted.routed.teacher_counts().items():
        tally.add(f"teacher/{teacher}", count)
        tally.add("teachers", count)


def sample_rows(step: int, admitted: Admitted, text_of: Callable[[Prompt, str], str]) -> list[SampleRow]:
    """Return the rows of ``samples/``; ``text_of`` decodes a prompt's trace by the name of its teacher."""
    routed, rows = admitted.routed, list[SampleRow]()
    for group, treatment, teacher, reason in zip(
        admitted.usable, routed.treatments, routed.teachers, routed.reasons, strict=True
    ):
        trace = None if teacher is None else text_of(group.prompt, teacher)
        rows.append(sample_row(step, group, treatment, teacher=teacher, trace=trace, dropped=reason))
    rows += [sample_row(step, group, Treatment.DROP, dropped=DropReason.STALE) for group in admitted.stale]
    rows += [sample_row(step, group, Treatment.DROP, dropped=DropReason.NO_VERDICT) for group in admitted.unjudged]
    return rows + [dropped_row(step, group.prompt, group.reason) for group in admitted.dropped]
