"""Plain GRPO: every group goes to RL; groups with equal rewards carry no signal (paper, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import WeighedGroup
from megatron_dypo.objective.weigh import grpo_weights
from megatron_dypo.types import Sample, Tier, Totals, Treatment


class Grpo:
    def __init__(self, cfg: ObjectiveConfig) -> None:
        self.cfg = cfg

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return self.cfg.kl_coef > 0

    def needs_current_logprobs(self) -> bool:
        return False

    def treat(self, tier: Tier | None, step: int) -> Treatment:
        return Treatment.REINFORCE

    def weigh(self, group: Sequence[Sample], totals: Totals, step: int) -> WeighedGroup:
        return WeighedGroup(weights=grpo_weights(group, totals, self.cfg, scale=1.0))
