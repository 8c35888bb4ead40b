"""Supervised fine-tuning on the teachers' traces: no rollouts, no gate (paper, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import WeighedGroup
from megatron_dypo.objective.weigh import sft_weights
from megatron_dypo.types import Sample, Tier, Totals, Treatment


class Sft:
    def __init__(self, cfg: ObjectiveConfig) -> None:
        self.cfg = cfg

    def needs_rollouts(self, step: int) -> bool:
        return False

    def needs_reference(self) -> bool:
        return False

    def needs_current_logprobs(self) -> bool:
        return False

    def treat(self, tier: Tier | None, step: int) -> Treatment:
        return Treatment.DISTIL

    def weigh(self, group: Sequence[Sample], totals: Totals, step: int) -> WeighedGroup:
        return WeighedGroup(weights=[sft_weights(group[0], totals, self.cfg, scale=self.cfg.gamma)])
