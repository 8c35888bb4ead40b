"""LUFFY: the trace is a member of the group, and its policy gradient is shaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.checks import require_positive
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.objective.metrics import LOSS_METRICS, SumMetric
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.mixed import Mixed, less_the_trace, trace_advantage
from megatron_dypo.objective.shapes import shape_index
from megatron_dypo.objective.token_weights import advantages, grpo_weights
from megatron_dypo.types import Sample, SampleKind, TokenWeights, Totals


@dataclass(frozen=True, kw_only=True)
class LuffyOptions:
    """Options of ``luffy``."""

    shape_gamma: float = 0.1
    """γ of f(p) = p/(p+γ)."""

    def __post_init__(self) -> None:
        require_positive(self, "shape_gamma")


class Luffy(Mixed):
    """Mixed-policy GRPO with policy shaping.

    A group is k−1 rollouts and the trace; all are judged, and Â is over all k. Each token of rollout i gets
    1/(n·k·length) of the surrogate; each token of the trace gets Â*/(n·k·length) of −f(p), f(p) = p/(p+γ), whose
    gradient is γp/(p+γ)² of −log π (π_φ = 1, no clip). Rows without a trace give GRPO on the k−1 rollouts.

    Source: arXiv 2504.14945 v5, eq. 4-6; code ElliottYan/LUFFY mix_core_alg.py. Paper and code differ: std and clip of
    eq. 4, 6 against neither, Z (``group_mean``) against 8192, entropy 0.01 against 0.001. Ambiguous: the weight of the
    entropy, which in the code follows from the number of microbatches. A trace that is judged wrong has Â* < 0, in the
    code too.
    """

    options_type = LuffyOptions
    metrics = (
        *LOSS_METRICS,
        trace_advantage("luffy"),
        SumMetric(
            "luffy/trace_reward", "", "mean reward of the teachers' traces",
            of="trace_reward", per="judged_traces", panel="Traces as members",
        ),
    )  # fmt: skip

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(LuffyOptions, cfg)

    def needs_trace_verdict(self) -> bool:
        return True

    def num_rollouts(self, group_size: int) -> int:
        return less_the_trace(group_size)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        weights, sums = grpo_weights(group, totals, self.cfg, scale=1.0, step=step), dict[str, float]()
        for place, (sample, advantage) in enumerate(zip(group, advantages(group, self.cfg), strict=True)):
            if sample.kind is SampleKind.TRACE:
                weights[place] = self._shaped(weights[place], advantage)
                sums = {"judged_traces": 1.0, "trace_advantage": advantage, "trace_reward": sample.reward}
        return WeightedGroup(weights=weights, sums=sums)

    def _shaped(self, member: TokenWeights, advantage: float) -> TokenWeights:
        shape = {"nll_shape": shape_index("luffy"), "shape_constant": self.options.shape_gamma}
        return {"nll_weight": member["pg_weight"] * advantage, **shape}
