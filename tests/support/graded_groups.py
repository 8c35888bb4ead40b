"""Graded groups of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dypo.types import GradedGroup, Prompt, Rollout, Tier, Verdict


def graded(
    order: int, correct: Sequence[bool], traces: Sequence[str] = ("a", "b"), versions: Sequence[int] | None = None
) -> GradedGroup:
    """Return the group of draw ``order`` with a rollout for each of ``correct``; teachers are called ``traces``."""
    prompt = Prompt(
        prompt_id=f"p{order}",
        visit=0,
        order=order,
        tokens=np.array([1, 2, 3], np.int32),
        text="q",
        answer="1",
        source="s",
        traces={name: np.array([7, 8, 9, 2], np.int32) for name in traces},
    )
    rollouts = tuple(
        Rollout(
            tokens=np.array([5, 6 + i], np.int32),
            logp=np.array([-1.0, -2.0], np.float32),
            text="r",
            finish="stop",
            policy_version=(versions or [4] * len(correct))[i],
        )
        for i in range(len(correct))
    )
    verdicts = tuple(Verdict(is_correct=c, reward=float(c) - 0.1) for c in correct)
    tier = Tier.EASY if all(correct) else Tier.MID if any(correct) else Tier.HARD
    return GradedGroup(prompt=prompt, rollouts=rollouts, verdicts=verdicts, tier=tier)
