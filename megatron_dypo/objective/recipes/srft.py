"""SRFT: supervised learning and RL on the trace, REINFORCE on the rollouts, each weighted by the entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require_positive
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.mixed import Mixed, less_the_trace, trace_advantage
from megatron_dypo.objective.shapes import shape_index
from megatron_dypo.objective.token_weights import advantages, length_divisor, trace_share
from megatron_dypo.types import Sample, SampleKind, TokenWeights, Totals


@dataclass(frozen=True, kw_only=True)
class SrftOptions:
    """Options of ``srft``."""

    variant: Literal["paper", "hpt_code"] = "paper"
    """``hpt_code`` is the re-implementation by HPT's authors: the trace takes one of the group's places, and its policy
    gradient has LUFFY's shape (γ = 0.1) and the share of one member."""
    trace_weight: float = 0.5
    """The 0.5 of w_SFT = 0.5·e^(−H̄)."""
    right_weight: float = 0.1
    """The 0.1 of w_RL = 0.1·e^(H̄)."""

    def __post_init__(self) -> None:
        require_positive(self, "trace_weight", "right_weight")


class Srft(Mixed):
    """L = L_SFT of the trace + L_RL of the trace + L_RL of the rollouts (eq. 13).

    Each token of the trace gets 1/(n·length) of −(0.5·e^(−H̄) + Â*·p)·log π (eq. 8, 10; Â* over rollouts and trace, eq.
    7). Each token of a right rollout gets 1/(n·k·length) of −0.1·e^(H̄)·log π, of a wrong one of log π (eq. 12). H̄ is
    the mean entropy of the sequence. No ratio, no clip; rows without a trace give the rollouts' terms.

    Source: arXiv 2506.19767 v1. Its authors published no code. TsinghuaC3I/Unify-Post-Training (mix_actor.py:349-400)
    reads it differently, and does not reach the published figures. Ambiguous: the tokens of H; token sum or mean; 8 + 1
    members (here) or 7 + 1; the entropy bonus.
    """

    options_type = SrftOptions
    metrics = (*LOSS_METRICS, trace_advantage("srft"))

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(SrftOptions, cfg)

    def needs_trace_verdict(self) -> bool:
        return True

    def num_rollouts(self, group_size: int) -> int:
        return group_size if self.options.variant == "paper" else less_the_trace(group_size)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        is_paper, weights, sums = self.options.variant == "paper", list[TokenWeights](), dict[str, float]()
        num_rollouts = sum(sample.kind is SampleKind.ROLLOUT for sample in group)
        count = num_rollouts if is_paper else len(group)
        for sample, advantage in zip(group, advantages(group, self.cfg), strict=True):
            unit = 1 / (totals.num_prompts * length_divisor(sample, totals, self.cfg, group))
            if sample.kind is SampleKind.ROLLOUT:
                weights.append(self._rollout(sample, unit / count))
                continue
            supervised = self.options.trace_weight * trace_share(sample, totals, self.cfg, group)
            constant = advantage * (unit if is_paper else unit / count) / supervised
            shape = shape_index("srft" if is_paper else "srft_luffy")
            weights.append({"nll_weight": supervised, "nll_shape": shape, "shape_constant": constant})
            sums = {"judged_traces": 1.0, "trace_advantage": advantage}
        return WeightedGroup(weights=weights, sums=sums)

    def _rollout(self, sample: Sample, share: float) -> TokenWeights:
        if not sample.is_correct:
            return {"nll_weight": -share}
        return {"nll_weight": self.options.right_weight * share, "nll_shape": shape_index("exp_entropy")}
