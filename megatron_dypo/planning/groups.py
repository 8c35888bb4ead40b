"""Count what an objective samples for a prompt and learns from it, on average over the tiers. Pure arithmetic.

A built-in objective is asked, as the loop asks it, with a group of each tier whose row has a trace. An objective of the
user's own is asked only for the number of its rollouts, since its ``treat`` may read columns that no plan knows: its
Easy prompts are assumed to be dropped, Hard ones to give a trace and Mid ones their rollouts, as in ``dypo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_dypo.checks import require
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.types import GradedGroup, Prompt, Rollout, Tier, Treatment, Verdict

_ASSUMED = {Tier.EASY: Treatment.DROP, Tier.MID: Treatment.REINFORCE, Tier.HARD: Treatment.DISTILL}
_ONE = np.zeros(1, np.int32)


@dataclass(frozen=True, kw_only=True)
class MeanGroup:
    """Counts for one prompt that is drawn, on average over the tiers."""

    rollouts: int
    """Rollouts that are sampled; 0: the objective learns from traces alone."""
    learned: float
    """Share of the prompts that enter an update."""
    learned_rollouts: float
    """Rollouts that enter an update, and so get log-probs."""
    sequences: float
    """Sequences that enter an update: rollouts and traces."""


def mean_group(cfg: ObjectiveConfig, group_size: int, shares: Mapping[Tier, float], *, step: int) -> MeanGroup:
    """Return the counts of an objective in a step.

    Args:
        shares: share of each tier among the prompts.

    Raises:
        ValueError: the objective cannot work with this group size, or learns from no tier.
    """
    objective = build_objective(cfg)
    rollouts = objective.num_rollouts(group_size) if objective.needs_rollouts(step) else 0
    treatments = {tier: _treatment(objective, tier, rollouts, step) for tier in Tier}

    def total(counts: Mapping[Treatment, float]) -> float:
        return sum(share * counts.get(treatments[tier], 0.0) for tier, share in shares.items())

    learned = total({Treatment.DISTILL: 1.0, Treatment.REINFORCE: 1.0, Treatment.MIX: 1.0})
    require(learned > 0, f"objective.name={cfg.name}", "learns from no tier, so there is no update to plan")
    return MeanGroup(
        rollouts=rollouts,
        learned=learned,
        learned_rollouts=total({Treatment.REINFORCE: rollouts, Treatment.MIX: rollouts}),
        sequences=total({Treatment.DISTILL: 1.0, Treatment.REINFORCE: rollouts, Treatment.MIX: rollouts + 1.0}),
    )


def _treatment(objective: Objective, tier: Tier, rollouts: int, step: int) -> Treatment:
    """Return the treatment of a group of a tier; of a group without rollouts if the objective samples none."""
    if type(objective) not in OBJECTIVES.values():
        return _ASSUMED[tier] if rollouts else Treatment.DISTILL
    prompt = Prompt(
        prompt_id="", visit=0, order=0, tokens=_ONE, text="", answer="", source="", traces={"teacher": _ONE}
    )
    logp = np.zeros(1, np.float32)
    rollout = Rollout(tokens=_ONE, logp=logp, text="", finish="stop", policy_version=step)
    right = {Tier.EASY: rollouts, Tier.MID: rollouts // 2, Tier.HARD: 0}[tier]
    verdicts = [Verdict(is_correct=place < right, reward=float(place < right)) for place in range(rollouts)]
    group = GradedGroup(
        prompt=prompt, rollouts=(rollout,) * rollouts, verdicts=tuple(verdicts), tier=tier if rollouts else None
    )
    return objective.treat(group, step)
