"""DYPO: Easy is dropped, Hard learns from a teacher, Mid from α·GRPO + (1−α)·GAL (paper, eq. 4, 24)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_dypo.checks import require
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.schedule import bounds, weight_at
from megatron_dypo.objective.distillation import OPD_METRICS, OPD_STREAMS, opd_term, opd_weights
from megatron_dypo.objective.gal import GAL_METRICS
from megatron_dypo.objective.loss import LossInputs, PolicyTokens, Sums
from megatron_dypo.objective.metrics import LOSS_METRICS, SumMetric
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.objective.token_weights import add_weights, gal_weights, grpo_weights, sft_weights
from megatron_dypo.types import GradedGroup, Sample, Tier, Totals, Treatment

_TREATMENTS = {Tier.EASY: Treatment.DROP, Tier.MID: Treatment.REINFORCE, Tier.HARD: Treatment.DISTILL}


class Dypo(Objective):
    """The paper's objective (eq. 4, 24).

    Hard: each token of one teacher's trace gets γ/n·1/length of −log π. Mid: each token of rollout i gets α of GRPO's
    clipped Â_i and 1−α of GAL's c_i = ∂L_GAL/∂ℓ_i on log π (eq. 14, 15), up for a success and down for a failure.
    A Hard prompt without a trace is dropped, or its rollouts get what ``opd`` gives them, times γ.
    """

    metrics: tuple[SumMetric, ...] = (*LOSS_METRICS, *GAL_METRICS)

    def __init__(self, cfg: ObjectiveConfig) -> None:
        if cfg.hard_without_trace == "opd":
            self.streams = (*STREAMS, *OPD_STREAMS)
            self.metrics = (*self.metrics, *OPD_METRICS)
            both = "must be 0 with hard_without_trace=opd: both say what becomes of Hard prompts"
            require(cfg.rl_only_steps == 0, f"objective.rl_only_steps={cfg.rl_only_steps}", both)
            require(cfg.ratio == "token", "objective.ratio=sequence", "must be token with hard_without_trace=opd")
        super().__init__(cfg)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return self.cfg.least_alpha() < 1 or bounds(self.cfg.kl_coef)[1] > 0

    def needs_current_logprobs(self) -> bool:
        return self.cfg.least_alpha() < 1 and self.cfg.gal_coefficients == "exact"

    def needs_teacher_logp(self) -> bool:
        return self.cfg.hard_without_trace == "opd"

    def reads_teacher(self, group: Sequence[Sample]) -> bool:
        is_hard = not any(sample.is_correct for sample in group)
        return self.needs_teacher_logp() and group[0].treatment is Treatment.REINFORCE and is_hard

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        assert group.tier is not None, "dypo grades every group"
        if self.needs_teacher_logp() and group.tier is Tier.HARD and not group.prompt.traces:
            return Treatment.REINFORCE
        return Treatment.REINFORCE if step < self.cfg.rl_only_steps else _TREATMENTS[group.tier]

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        cfg, alpha = self.cfg, self.cfg.alpha_at(step)
        if group[0].treatment is Treatment.DISTILL:
            return WeightedGroup(weights=[sft_weights(group[0], totals, cfg, scale=weight_at(cfg.gamma, step))])
        if self.reads_teacher(group):
            weights, sums = opd_weights(group, totals, cfg, scale=weight_at(cfg.gamma, step), step=step)
            return WeightedGroup(weights=weights, sums=sums)
        grpo = grpo_weights(group, totals, cfg, scale=alpha, step=step)
        if alpha == 1:
            return WeightedGroup(weights=grpo)
        gal, sums = gal_weights(group, totals, cfg, scale=1 - alpha)
        return WeightedGroup(weights=[add_weights(a, b) for a, b in zip(grpo, gal, strict=True)], sums=sums)

    def loss_term(self, policy: PolicyTokens, x: LossInputs) -> tuple[Tensor, Sums]:
        return opd_term(policy, x, self.cfg) if self.needs_teacher_logp() else super().loss_term(policy, x)
