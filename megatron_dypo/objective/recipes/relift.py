"""ReLIFT: GRPO on all prompts, and now and then an update on buffered traces of prompts that no rollout solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.checks import require, require_positive
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.config.schedule import Weight, bounds, require_weight, weight_at
from megatron_dypo.objective.recipes.base import TraceBuffer, WeightedGroup
from megatron_dypo.objective.recipes.grpo import Grpo
from megatron_dypo.objective.token_weights import trace_share
from megatron_dypo.types import GradedGroup, Sample, Tier, Totals, Treatment


@dataclass(frozen=True, kw_only=True)
class ReliftOptions:
    """Options of ``relift``."""

    buffer_size: int = 128
    """M: traces of an update on the buffer, which is made once that many wait."""
    buffer_keeps: int = 4096
    """Most traces that wait on a replica; older ones are forgotten."""
    buffer_entropy_coef: Weight = 1e-4
    """α: weight of the entropy in an update on the buffer; a weight. Other updates use ``objective.entropy_coef``."""

    def __post_init__(self) -> None:
        require_positive(self, "buffer_size")
        rule = f"must be at least buffer_size={self.buffer_size}"
        require(self.buffer_keeps >= self.buffer_size, f"buffer_keeps={self.buffer_keeps}", rule)
        require_weight(self, "buffer_entropy_coef")


class Relift(Grpo):
    """Each rollout gets what ``grpo`` gives it; a trace of each Hard prompt goes into a buffer.

    Once M traces wait, an update on them follows the updates of a rollout batch: each token of the M newest gets
    1/(M·length) of −γ·log π − α·H.

    Source: arXiv 2506.07527; code TheRoadQaQ/ReLIFT trainer.py:417-520, actor.py:204-218. Paper and code differ: token
    mean over the group, std and clip against Σ/8192 and neither; α 1e-4 against 1e-3; trace means against the token
    mean of microbatches. Different: the code gives that update an AdamW state, a norm clip and a learning rate of its
    own; in the paper and here all updates share them. Here each update counts as a step of ``run.steps``.
    """

    options_type = ReliftOptions

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(ReliftOptions, cfg)

    def needs_entropy_gradient(self) -> bool:
        return super().needs_entropy_gradient() or bounds(self.options.buffer_entropy_coef)[1] > 0

    def trace_buffer(self) -> TraceBuffer:
        return TraceBuffer(size=self.options.buffer_size, keeps=self.options.buffer_keeps)

    def buffers_trace(self, group: GradedGroup, step: int) -> bool:
        return group.tier is Tier.HARD

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        if group[0].treatment is not Treatment.DISTILL:
            return super().token_weights(group, totals, step)
        share = trace_share(group[0], totals, self.cfg)
        entropy = weight_at(self.options.buffer_entropy_coef, step) * share
        return WeightedGroup(
            weights=[{"nll_weight": weight_at(self.cfg.gamma, step) * share, "entropy_weight": entropy}]
        )

    def weights_of(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        is_buffered = group[0].treatment is Treatment.DISTILL
        return self.token_weights(group, totals, step) if is_buffered else super().weights_of(group, totals, step)
