"""Fixed weighting of supervised learning and RL on every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import Weight, require_weight, weight_at
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.mixed import Mixed, less_the_trace
from megatron_dypo.objective.token_weights import grpo_weights, sft_weights, split_group
from megatron_dypo.types import Sample, Totals


@dataclass(frozen=True, kw_only=True)
class FixedOptions:
    """Options of ``fixed``."""

    trace_weight: Weight = 0.5
    """λ: the weight of −log π of the trace against that of GRPO; a weight."""
    trace_takes_a_place: bool = False
    """Whether the trace is one of the k members: then k − 1 rollouts are sampled, else k."""

    def __post_init__(self) -> None:
        require_weight(self, "trace_weight", high=1.0)


class Fixed(Mixed):
    """L = (1/n) Σ_q [λ·L_SFT + (1−λ)·L_GRPO], for every prompt.

    Each token of the trace gets λ/(n·length) of −log π; each token of rollout i gets (1−λ)/(n·k·length) of the clipped
    surrogate with Â_i over the rollouts alone. A prompt without a trace has the same Â_i and no term of a trace.

    Sources: CHORD's figure 9 (arXiv 2508.11408; token means, λ in {0.02, 0.1, 0.5}); "RL w/ SFT loss" of LUFFY (arXiv
    2504.14945; code ElliottYan/LUFFY mix_actor.py:112-142: 7 rollouts, no std, no clip, Σ/8192, and 1.0 of the token
    mean of each microbatch). Ambiguous: in that code λ follows from the number of microbatches.
    """

    options_type = FixedOptions

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(FixedOptions, cfg)

    def num_rollouts(self, group_size: int) -> int:
        return less_the_trace(group_size) if self.options.trace_takes_a_place else group_size

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        share, (rollouts, traces) = weight_at(self.options.trace_weight, step), split_group(group)
        weights = grpo_weights(rollouts, totals, self.cfg, scale=1 - share, step=step)
        scale = share * weight_at(self.cfg.gamma, step)
        weights += [sft_weights(trace, totals, self.cfg, scale=scale) for trace in traces]
        return WeightedGroup(weights=weights)
