"""DYPO: Easy is dropped, Hard learns from a teacher, Mid from α·GRPO + (1−α)·GAL (paper, eq. 4, 24)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.schedule import bounds, weight_at
from megatron_dypo.objective.gal import GAL_METRICS
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.token_weights import add_weights, gal_weights, grpo_weights, sft_weights
from megatron_dypo.types import GradedGroup, Sample, Tier, Totals, Treatment

_TREATMENTS = {Tier.EASY: Treatment.DROP, Tier.MID: Treatment.REINFORCE, Tier.HARD: Treatment.DISTILL}


class Dypo(Objective):
    """The paper's objective (eq. 4, 24).

    Hard: each token of one teacher's trace gets γ/n·1/length of −log π. Mid: each token of rollout i gets α of GRPO's
    clipped Â_i and 1−α of GAL's c_i = ∂L_GAL/∂ℓ_i on log π (eq. 14, 15), up for a success and down for a failure.
    """

    metrics = (*LOSS_METRICS, *GAL_METRICS)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.alpha)[0] < 1 or bounds(self.cfg.kl_coef)[1] > 0

    def needs_current_logprobs(self) -> bool:
        return bounds(self.cfg.alpha)[0] < 1 and self.cfg.gal_coefficients == "exact"

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        assert group.tier is not None, "dypo grades every group"
        return Treatment.REINFORCE if step < self.cfg.rl_only_steps else _TREATMENTS[group.tier]

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        cfg, alpha = self.cfg, weight_at(self.cfg.alpha, step)
        if group[0].treatment is Treatment.DISTILL:
            return WeightedGroup(weights=[sft_weights(group[0], totals, cfg, scale=weight_at(cfg.gamma, step))])
        grpo = grpo_weights(group, totals, cfg, scale=alpha, step=step)
        if alpha == 1:
            return WeightedGroup(weights=grpo)
        gal, sums = gal_weights(group, totals, cfg, scale=1 - alpha)
        return WeightedGroup(weights=[add_weights(a, b) for a, b in zip(grpo, gal, strict=True)], sums=sums)
