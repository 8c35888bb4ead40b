"""Graded groups → samples: the objective decides the treatment of each group; the trainer draws a teacher's trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.types import DropReason, GradedGroup, Sample, SampleKind, Tokens, Treatment

_WITH_ROLLOUTS = (Treatment.REINFORCE, Treatment.MIX)
_WITH_TRACE = (Treatment.DISTILL, Treatment.MIX)


@dataclass(kw_only=True)
class Routed:
    """The outcome of one round of groups; the lists are parallel to the groups."""

    treatments: list[Treatment] = field(default_factory=list)
    samples: list[list[Sample]] = field(default_factory=list)
    """Empty for a group that was dropped."""
    teachers: list[str | None] = field(default_factory=list)
    """The teacher drawn."""
    reasons: list[DropReason | None] = field(default_factory=list)
    """Why a group was dropped; None where it was not."""
    buffered: list[list[Sample]] = field(default_factory=list)
    """Traces for the buffer, each a group of its own."""

    @property
    def without_teacher(self) -> int:
        """The number of groups that were dropped because they have no trace to learn from."""
        return self.reasons.count(DropReason.NO_TEACHER)

    def teacher_counts(self) -> Counter[str]:
        """Count the traces drawn from each teacher."""
        return Counter(name for name in self.teachers if name is not None)


def route(groups: Sequence[GradedGroup], objective: Objective, *, step: int, version: int, seed: int) -> Routed:
    """Turn graded groups into samples that may wait in the queues.

    Args:
        step: the optimizer step that collects, for ``rl_only_steps`` and phases.
        version: version of the weights that the servers hold now.
        seed: of the draw of teachers, which is a pure function of (seed, prompt id, visit).
    """
    routed = Routed()
    for group in groups:
        treatment, teacher, reason = objective.treat(group, step), None, None
        samples = rollout_samples(group, treatment) if treatment in _WITH_ROLLOUTS else []
        if treatment in _WITH_TRACE:
            drawn = draw_trace(group.prompt, seed)
            if drawn is None:
                treatment, samples, reason = Treatment.DROP, [], DropReason.NO_TEACHER
            else:
                teacher, trace = drawn
                samples.append(trace_sample(group, trace, treatment, member=len(samples), version=version))
        elif treatment is Treatment.DROP:
            reason = DropReason.EASY
        if objective.buffers_trace(group, step) and (drawn := draw_trace(group.prompt, seed)) is not None:
            kept = trace_sample(group, drawn[1], Treatment.DISTILL, member=0, version=version)
            routed.buffered.append([replace(kept, is_buffered=True)])
        routed.treatments.append(treatment)
        routed.samples.append(samples)
        routed.teachers.append(teacher)
        routed.reasons.append(reason)
    return routed


def will_learn_from(group: GradedGroup, objective: Objective, step: int) -> bool:
    """Return whether :func:`route` will make samples of a group. Call it only for a group that has its verdicts."""
    if group.tier is None:
        return False
    treatment = objective.treat(group, step)
    return treatment is Treatment.REINFORCE or (treatment in _WITH_TRACE and bool(group.prompt.traces))


def rollout_samples(group: GradedGroup, treatment: Treatment) -> list[Sample]:
    """Return one sample for each rollout of a group that has its verdicts."""
    oldest = _oldest_version(group)
    return [
        Sample(
            order=group.prompt.order,
            member=member,
            treatment=treatment,
            kind=SampleKind.ROLLOUT,
            tokens=np.concatenate([group.prompt.tokens, rollout.tokens]).astype(np.int32),
            num_prompt_tokens=len(group.prompt.tokens),
            policy_version=oldest,
            is_correct=verdict.is_correct,
            reward=verdict.reward,
            rollout_logp=rollout.logp,
            num_forced_tokens=rollout.num_forced_tokens,
            routes=rollout.routes,
        )
        for member, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True))
    ]


def trace_sample(group: GradedGroup, trace: Tokens, treatment: Treatment, *, member: int, version: int) -> Sample:
    """Return the sample of a teacher's trace, the ``member`` of the group."""
    verdict = group.trace_verdict
    return Sample(
        order=group.prompt.order,
        member=member,
        treatment=treatment,
        kind=SampleKind.TRACE,
        tokens=np.concatenate([group.prompt.tokens, trace]).astype(np.int32),
        num_prompt_tokens=len(group.prompt.tokens),
        policy_version=_oldest_version(group) if treatment is Treatment.MIX else version,
        is_correct=verdict is not None and verdict.is_correct,
        reward=0.0 if verdict is None else verdict.reward,
    )


def _oldest_version(group: GradedGroup) -> int:
    return min(rollout.policy_version for rollout in group.rollouts)
