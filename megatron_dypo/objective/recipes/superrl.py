"""SuperRL: supervised learning on the prompts that no rollout solves, RL on all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import bounds, weight_at
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.token_weights import grpo_weights, sft_weights
from megatron_dypo.types import GradedGroup, Sample, Totals, Treatment


@dataclass(frozen=True, kw_only=True)
class SuperRlOptions:
    """Options of ``superrl``."""

    gate: Literal["reward", "advantage"] = "reward"
    """A prompt goes to RL if a rollout has a positive ``reward``. With ``advantage`` (SuperRL-A) it goes to RL if a
    rollout has a positive advantage; groups of equal rewards, also all right ones, get supervised learning."""


class SuperRl(Objective):
    """L = (1/n) Σ_q [c·L_GRPO + (1−c)·L_SFT], c = 1 if max R > 0.

    If c is 0, each token of one trace gets 1/(n·length) of −log π; else each token of rollout i gets GRPO's
    1/(n·k·length) of the clipped surrogate. Groups that are all right have Â = 0 and still count in n.

    Source: arXiv 2506.01096 v2, eq. 1, 2, section 3.2 (v1 is another method). Ambiguous: whether the authors' code
    decides for a prompt or for a batch; here it is a prompt. The paper takes the mean over several demonstrations; here
    one is drawn at each visit, with the same expectation. Not done: the learnt weights of "Log-Sigma".
    """

    options_type = SuperRlOptions

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(SuperRlOptions, cfg)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        rewards = [verdict.reward for verdict in group.verdicts]
        is_for_rl = max(rewards) > 0 if self.options.gate == "reward" else max(rewards) > min(rewards)
        return Treatment.REINFORCE if is_for_rl else Treatment.DISTILL

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        if group[0].treatment is Treatment.DISTILL:
            scale = weight_at(self.cfg.gamma, step)
            return WeightedGroup(weights=[sft_weights(group[0], totals, self.cfg, scale=scale)])
        return WeightedGroup(weights=grpo_weights(group, totals, self.cfg, scale=1.0, step=step))
