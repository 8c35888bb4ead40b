"""CHORD: (1−μ) of GRPO and μ of supervised learning, with or without the token weight φ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import Weight, require_weight, weight_at
from megatron_dypo.objective.metrics import LOSS_METRICS, SumMetric
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.mixed import Mixed
from megatron_dypo.objective.shapes import shape_index
from megatron_dypo.objective.token_weights import advantages, split_group
from megatron_dypo.types import Sample, SampleKind, TokenWeights, Totals


@dataclass(frozen=True, kw_only=True)
class ChordOptions:
    """Options of ``chord``."""

    mu: Weight = 0.1
    """μ: the weight of the supervised term; a weight."""
    phi: bool = True
    """Whether φ = p(1−p) scales the weight of each token of a trace."""

    def __post_init__(self) -> None:
        require_weight(self, "mu", high=1.0)


class Chord(Mixed):
    """L = (1−μ)·L_GRPO + μ·L_SFT-φ (eq. 3), each term a mean over its own tokens.

    Each token of rollout i gets (1−μ)/N of the clipped surrogate, N the rollouts' tokens of the update (eq. 2); each
    token of a trace gets μ/N* of −φ·log π, φ = p(1−p) without gradient (eq. 5, 6), N* the traces' tokens.

    Source: arXiv 2508.11408; code modelscope/Trinity-RFT chord_policy_loss.py. Paper and code differ: dual clip 3 and
    means of microbatches in the code. Ambiguous: 200 steps of μ (section 4.3) or 30 (appendix). Different here: the
    paper's expert data has other prompts than RL; here traces belong to the sampled prompts, and a row without a trace
    gives rollouts alone.
    """

    options_type = ChordOptions
    metrics = (
        *LOSS_METRICS,
        SumMetric(
            "chord/mu", "", "μ: the weight of the supervised term", of="mu", per="mu_groups", panel="μ of CHORD"
        ),
    )  # fmt: skip

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(ChordOptions, cfg)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        mu, (rollouts, traces) = weight_at(self.options.mu, step), split_group(group)
        tokens = {kind: max(count, 1) for kind, count in totals.num_response_tokens.items()}
        share = (1 - mu) / tokens[SampleKind.ROLLOUT]
        kl_weight = share * weight_at(self.cfg.kl_coef, step)
        weights: list[TokenWeights] = [
            {"advantage": advantage, "pg_weight": share, "kl_weight": kl_weight}
            for advantage in advantages(rollouts, self.cfg)
        ]
        shape = shape_index("phi" if self.options.phi else "constant")
        weights += [{"nll_weight": mu / tokens[SampleKind.TRACE], "nll_shape": shape} for _ in traces]
        return WeightedGroup(weights=weights, sums={"mu": mu, "mu_groups": 1.0})
