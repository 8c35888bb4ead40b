"""Prefix-RFT: one rollout of each group continues the beginning of a teacher's trace; both parts are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import Schedule, Weight, require_weight, weight_at
from megatron_dypo.data.teachers import draw_share
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.forced import Forced, behind, first_tokens, forced_metrics, forced_sums, trace_of
from megatron_dypo.objective.recipes.mixed import less_the_trace
from megatron_dypo.objective.token_weights import advantages, grpo_weights
from megatron_dypo.rollout.plan import GroupPart, GroupPlan, whole_group
from megatron_dypo.types import Prompt, Sample, Totals


@dataclass(frozen=True, kw_only=True)
class PrefixRftOptions:
    """Options of ``prefix_rft``."""

    low: Weight = field(default_factory=lambda: Schedule(start=0.95, end=0.05, steps=500, shape="cosine"))
    """Smallest share of a trace that becomes a prefix; a weight."""
    high: float = 0.95
    """Largest share of a trace that becomes a prefix."""
    keep: float = 0.2
    """Share of a prefix that is learned from: the tokens with the largest entropy of π_old."""
    continuation: Literal["reward", "none"] = "reward"
    """Advantage of the tokens after the prefix: the reward, or none."""

    def __post_init__(self) -> None:
        require(0 < self.high < 1, f"high={self.high}", "must be in (0, 1)")
        require(0 < self.keep <= 1, f"keep={self.keep}", "must be in (0, 1]")
        require_weight(self, "low", high=self.high)


class PrefixRft(Forced):
    """GRPO on k−1 rollouts, and on a k-th: y*_{<L} and the policy's continuation; L = ⌊l·|y*|⌋, l ~ U(low, high).

    Each token of rollout i < k gets 1/(n·k·length) of the surrogate, with Â over these k−1. So does each token of the
    k-th: its prefix, where entropy is in the top ``keep``, with R_k − mean R of the k−1; its continuation, with R_k.

    Source: arXiv 2507.01679; code ZeroYuHuang/prefix_rft core_algos.py:262-308, dp_actor.py. Different: entropies in
    the code are π_θ's over a microbatch; here they are π_old's over a prefix. Ambiguous: which advantages were run
    (``_v2`` has 0 in place of R_k, in the prefix too); std, dual clip 3 and the entropy bonus.
    """

    options_type = PrefixRftOptions
    metrics = (*LOSS_METRICS, *forced_metrics("prefix_rft"))

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(PrefixRftOptions, cfg)

    def needs_old_entropy(self) -> bool:
        return self.options.keep < 1

    def num_rollouts(self, group_size: int) -> int:
        return less_the_trace(group_size) + 1

    def plan_group(self, prompt: Prompt, group_size: int, *, step: int, seed: int) -> GroupPlan:
        share = draw_share(prompt, seed, weight_at(self.options.low, step), self.options.high)
        prefix = first_tokens(trace_of(prompt, seed), share)
        parts = GroupPart(count=group_size - 1), GroupPart(count=1, prefix=prefix)
        return GroupPlan(first=parts) if len(prefix) else whole_group(group_size)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        own = [sample for sample in group if not sample.num_forced_tokens]
        mean, scores = sum(sample.reward for sample in own) / len(own), iter(advantages(own, self.cfg))
        given = grpo_weights(group, totals, self.cfg, scale=1.0, step=step)
        after, keep = float(self.options.continuation == "reward"), self.options.keep
        credit = [behind(s, mean, after, keep) if s.num_forced_tokens else next(scores) for s in group]
        weights = [{**one, "advantage": advantage} for one, advantage in zip(given, credit, strict=True)]
        return WeightedGroup(weights=weights, sums=forced_sums(group))
