"""The classic two phases in one run: ``sft_steps`` of SFT, then GRPO."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.recipes.grpo import Grpo
from megatron_dypo.objective.recipes.sft import Sft
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


class SftThenRl(Objective):
    """SFT (eq. 5), then GRPO (eq. 3), with one optimizer state and one data set.

    Each token gets what ``sft`` gives the traces of the first ``sft_steps``, then what ``grpo`` gives rollouts.
    """

    def __init__(self, cfg: ObjectiveConfig) -> None:
        if cfg.sft_steps == 0:
            raise ValueError("objective.sft_steps=0: sft_then_rl needs the length of its first phase")
        super().__init__(cfg)
        self.sft, self.grpo = Sft(cfg), Grpo(cfg)

    def _phase(self, step: int) -> Objective:
        return self.sft if step < self.cfg.sft_steps else self.grpo

    def needs_rollouts(self, step: int) -> bool:
        return self._phase(step).needs_rollouts(step)

    def needs_reference(self) -> bool:
        return self.grpo.needs_reference()

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return self._phase(step).treat(group, step)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        # The group decides, not the phase: traces queued at the end of the first phase are still traces in the second.
        own = self.sft if group[0].treatment is Treatment.DISTILL else self.grpo
        return own.token_weights(group, totals, step)
