"""Graded groups → samples: each group gets the objective's treatment, a Hard one a teacher's trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.types import DropReason, GradedGroup, Sample, Treatment


@dataclass(kw_only=True)
class Routed:
    """What became of one round of groups; the lists are parallel to the groups."""

    treatments: list[Treatment] = field(default_factory=list)
    samples: list[list[Sample]] = field(default_factory=list)
    """Empty for a group that was dropped."""
    teachers: list[str | None] = field(default_factory=list)
    """The teacher drawn."""
    reasons: list[DropReason | None] = field(default_factory=list)
    """Why a group was dropped; None where it was not."""

    @property
    def without_teacher(self) -> int:
        """Groups that should have been distilled and have no trace; dropped."""
        return self.reasons.count(DropReason.NO_TEACHER)

    def teacher_counts(self) -> Counter[str]:
        return Counter(name for name in self.teachers if name is not None)


def route(groups: Sequence[GradedGroup], objective: Objective, *, step: int, version: int, seed: int) -> Routed:
    """Turn graded groups into samples that may wait in the queues.

    Args:
        step: the optimizer step that collects, for ``rl_only_steps`` and phases.
        version: version of the weights that the servers hold now.
        seed: of the teacher draw, which is a pure function of (seed, prompt id, visit).
    """
    routed = Routed()
    for group in groups:
        treatment, teacher, samples = objective.treat(group.tier, step), None, []
        reason = DropReason.EASY if treatment is Treatment.DROP else None
        if treatment is Treatment.REINFORCE:
            samples = _rollout_samples(group)
        elif treatment is Treatment.DISTIL:
            drawn = draw_trace(group.prompt, seed)
            if drawn is None:
                treatment, reason = Treatment.DROP, DropReason.NO_TEACHER
            else:
                teacher, trace = drawn
                samples = [_trace_sample(group, trace, version)]
        routed.treatments.append(treatment)
        routed.samples.append(samples)
        routed.teachers.append(teacher)
        routed.reasons.append(reason)
    return routed


def _rollout_samples(group: GradedGroup) -> list[Sample]:
    oldest = min(rollout.policy_version for rollout in group.rollouts)
    return [
        Sample(
            order=group.prompt.order,
            member=member,
            treatment=Treatment.REINFORCE,
            tokens=np.concatenate([group.prompt.tokens, rollout.tokens]).astype(np.int32),
            num_prompt_tokens=len(group.prompt.tokens),
            policy_version=oldest,
            is_correct=verdict.is_correct,
            reward=verdict.reward,
            rollout_logp=rollout.logp,
        )
        for member, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True))
    ]


def _trace_sample(group: GradedGroup, trace: np.ndarray, version: int) -> Sample:
    return Sample(
        order=group.prompt.order,
        member=0,
        treatment=Treatment.DISTIL,
        tokens=np.concatenate([group.prompt.tokens, trace]).astype(np.int32),
        num_prompt_tokens=len(group.prompt.tokens),
        policy_version=version,
    )
