"""DYPO: Easy is dropped, Hard learns from a teacher, Mid from α·GRPO + (1−α)·GAL (paper, eq. 4, 24)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import WeighedGroup
from megatron_dypo.objective.weigh import add, gal_weights, grpo_weights, sft_weights
from megatron_dypo.types import Sample, Tier, Totals, Treatment

_TREATMENTS = {Tier.EASY: Treatment.DROP, Tier.MID: Treatment.REINFORCE, Tier.HARD: Treatment.DISTIL}


class Dypo:
    def __init__(self, cfg: ObjectiveConfig) -> None:
        self.cfg = cfg

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return self.cfg.alpha < 1 or self.cfg.kl_coef > 0

    def needs_current_logprobs(self) -> bool:
        return self.cfg.alpha < 1 and self.cfg.gal_coefficients == "exact"

    def treat(self, tier: Tier | None, step: int) -> Treatment:
        assert tier is not None, "dypo grades every group"
        return Treatment.REINFORCE if step < self.cfg.rl_only_steps else _TREATMENTS[tier]

    def weigh(self, group: Sequence[Sample], totals: Totals, step: int) -> WeighedGroup:
        cfg = self.cfg
        if group[0].treatment is Treatment.DISTIL:
            return WeighedGroup(weights=[sft_weights(group[0], totals, cfg, scale=cfg.gamma)])
        grpo = grpo_weights(group, totals, cfg, scale=cfg.alpha)
        if cfg.alpha == 1:
            return WeighedGroup(weights=grpo)
        gal, statistics = gal_weights(group, totals, cfg, scale=1 - cfg.alpha)
        gal_loss = (1 - cfg.alpha) * statistics.loss / totals.num_prompts if statistics else 0.0
        weights = [add(a, b) for a, b in zip(grpo, gal, strict=True)]
        return WeighedGroup(weights=weights, gal=statistics, gal_loss=gal_loss)
