"""HPT: supervised learning on the prompts that few rollouts solve, RL on all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.checks import require
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import bounds, weight_at
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.token_weights import grpo_weights, sft_weights
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


@dataclass(frozen=True, kw_only=True)
class HptOptions:
    """Options of ``hpt``."""

    gate: float = 0.0
    """γ of the paper: a prompt gets supervised learning if at most this share of its rollouts is right."""

    def __post_init__(self) -> None:
        require(0 <= self.gate <= 1, f"gate={self.gate}", "must be in [0, 1]")


class Hpt(Objective):
    """L_SFT of a trace if P ≤ γ, else L_GRPO; P is the share of right rollouts.

    If P ≤ γ, each token of one trace gets 1/(n·length) of −log π; else each token of rollout i gets 1/(n·k·length) of
    the clipped surrogate. Groups that are all right have Â = 0 and still count in n.

    Source: arXiv 2509.04419 v2, eq. 10-13 (RL: token sum; SFT: token mean); code TsinghuaC3I/Unify-Post-Training
    mix_trainer.py:394-402 (no std, no clip, Σ/8192 against the token mean of each microbatch, entropy bonus 0.001).
    Ambiguous: "Dr. GRPO" in the text against the std of eq. 11. Not done: the code skips updates whose gradient norm is
    above 80, and cuts a batch with many supervised prompts to one update.
    """

    options_type = HptOptions

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(HptOptions, cfg)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        is_solved = group.num_correct > self.options.gate * len(group.verdicts)
        return Treatment.REINFORCE if is_solved else Treatment.DISTILL

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        if group[0].treatment is Treatment.DISTILL:
            scale = weight_at(self.cfg.gamma, step)
            return WeightedGroup(weights=[sft_weights(group[0], totals, self.cfg, scale=scale)])
        return WeightedGroup(weights=grpo_weights(group, totals, self.cfg, scale=1.0, step=step))
