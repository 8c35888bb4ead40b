"""TRAPO: if too many rollouts of a prompt are wrong, its next rollouts begin with more of a teacher's trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dypo.checks import require, require_positive
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.options import read_options
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.forced import Forced, forced_metrics, forced_sums, guided_plan, trace_of
from megatron_dypo.objective.shapes import shape_index
from megatron_dypo.objective.token_weights import grpo_weights
from megatron_dypo.rollout.plan import GroupPlan, whole_group
from megatron_dypo.types import Prompt, Sample, TokenWeights, Totals

_SHARES = {"paper": (0, 0.2, 0.5, 1), "code": (0, 0.25, 0.5, 1)}
_BELOW = {"paper": (-1, 0.5, 0.7, 0.9), "code": (-1, 2 / 4, 4 / 6, 7 / 7)}


@dataclass(frozen=True, kw_only=True)
class TrapoOptions:
    """Options of ``trapo``."""

    guides: Literal["paper", "code"] = "paper"
    """Shares of the trace, and the mean rewards below which they are given. The paper's shares are 0.2, 0.5, 1; the
    code's are 0.25, 0.5, 1."""
    alpha: float = 0.1
    """α of TrSFT."""

    def __post_init__(self) -> None:
        require_positive(self, "alpha")


class Trapo(Forced):
    """GRPO on micro-groups of k/2, k/4, k/8 and k/8 rollouts, and TrSFT on the prefixes of the later ones.

    Each sampled token of rollout i gets 1/(n·k·length) of the surrogate with Â over all k; each token of its prefix
    gets 1/(n·k·length) of −w·log π, w = p/max(p, α) without gradient. A prefix of share 1 is the whole trace: nothing
    is sampled.

    Source: arXiv 2512.17636; code Su-my/TRAPO mix_trainer.py:455-520, mix_core_alg.py:235. Paper and code differ: the
    ``guides``; std and clip against neither, Σ/8192; batch 128, lr 5e-6 against 8, 1e-6. Ambiguous: the paper's
    normaliser of TrSFT. Not done: the code moves the end of a prefix to that of a sentence.
    """

    options_type = TrapoOptions
    metrics = (*LOSS_METRICS, *forced_metrics("trapo"))

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.options = read_options(TrapoOptions, cfg)

    def parts_in_turn(self) -> int:
        return 4

    def num_rollouts(self, group_size: int) -> int:
        require(group_size % 8 == 0, f"rollout.group_size={group_size}", "must be a multiple of 8: k/2, k/4, k/8, k/8")
        return group_size

    def plan_group(self, prompt: Prompt, group_size: int, *, step: int, seed: int) -> GroupPlan:
        trace, k = trace_of(prompt, seed), self.num_rollouts(group_size)
        sizes, guides = (k // 2, k // 4, k // 8, k // 8), self.options.guides
        return guided_plan(trace, sizes, _SHARES[guides], _BELOW[guides]) if len(trace) else whole_group(k)

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        given = grpo_weights(group, totals, self.cfg, scale=1.0, step=step)
        weights = [self._guided(s, w) if s.num_forced_tokens else w for s, w in zip(group, given, strict=True)]
        return WeightedGroup(weights=weights, sums=forced_sums(group))

    def _guided(self, sample: Sample, own: TokenWeights) -> TokenWeights:
        is_forced = np.arange(sample.num_response_tokens) < sample.num_forced_tokens
        shape = {"nll_shape": shape_index("trsft"), "shape_constant": self.options.alpha}
        sampled = {name: np.where(is_forced, 0, own[name]).astype(np.float32) for name in ("pg_weight", "kl_weight")}
        return {**own, **sampled, **shape, "nll_weight": np.where(is_forced, own["pg_weight"], 0).astype(np.float32)}
