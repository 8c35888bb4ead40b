"""On-policy distillation with or without rewards: GRPO whose advantage a teacher corrects token by token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.schedule import bounds
from megatron_dypo.objective.distillation import OPD_METRICS, OPD_STREAMS, opd_term, opd_weights
from megatron_dypo.objective.loss import LossInputs, PolicyTokens, Sums
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


class Opd(Objective):
    """On-policy distillation.

    Each token of rollout i gets a·Â_i − λ(log π − log π_T): more if the teacher finds it likelier than the policy does.
    """

    streams = (*STREAMS, *OPD_STREAMS)
    metrics = (*LOSS_METRICS, *OPD_METRICS)

    def __init__(self, cfg: ObjectiveConfig) -> None:
        if cfg.ratio == "sequence":
            raise ValueError(
                "objective.ratio=sequence: opd has an advantage for each token, and a ratio of a sequence takes one"
            )
        super().__init__(cfg)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def needs_teacher_logp(self) -> bool:
        return True

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.REINFORCE

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        weights, sums = opd_weights(group, totals, self.cfg, scale=1.0, step=step)
        return WeightedGroup(weights=weights, sums=sums)

    def loss_term(self, policy: PolicyTokens, x: LossInputs) -> tuple[Tensor, Sums]:
        return opd_term(policy, x, self.cfg)
