"""Supervised fine-tuning on the teachers' traces: no rollouts, no gate (paper, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.schedule import weight_at
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.token_weights import sft_weights
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


class Sft(Objective):
    """Supervised fine-tuning (eq. 5, 20).

    Each token of one teacher's trace, drawn anew for every visit of the prompt, gets γ/(n·length) of −log π.
    """

    def needs_rollouts(self, step: int) -> bool:
        return False

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.DISTILL

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        scale = weight_at(self.cfg.gamma, step)
        return WeightedGroup(weights=[sft_weights(group[0], totals, self.cfg, scale=scale)])
