"""Plain GRPO: every group goes to RL; groups with equal rewards carry no signal (paper, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.schedule import bounds
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.token_weights import grpo_weights
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


class Grpo(Objective):
    """GRPO (eq. 3, 21, 22).

    Each token of rollout i gets 1/(n·k·length) of the clipped surrogate with Â_i = (R_i − mean R)/(std R + ξ), and of
    β_KL·k3.
    """

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.REINFORCE

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        return WeightedGroup(weights=grpo_weights(group, totals, self.cfg, scale=1.0, step=step))
