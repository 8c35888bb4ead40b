"""SFT whose tokens count by how sure the policy is of them: LUFFY's shape (arXiv 2504.14945, eq. 6). An example."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.loss import LossInputs, PolicyTokens, Sums
from megatron_dypo.objective.metrics import LOSS_METRICS, SumMetric
from megatron_dypo.objective.recipes.base import Objective, WeightedGroup
from megatron_dypo.objective.streams import STREAMS, Stream
from megatron_dypo.objective.token_weights import grpo_weights, length_divisor
from megatron_dypo.types import GradedGroup, Sample, Tier, Totals, Treatment


class ShapedTraces(Objective):
    """Each token of a trace gets γp/(p+γ)² of −log π, p = π_θ(token) without gradient, and less the later it comes.

    Rollouts, where ``objective.options.rollouts`` is true, get GRPO (eq. 3); Hard prompts then learn from a trace.
    """

    streams = (*STREAMS, Stream(name="shaped_weight", meaning="weight of the shaped −log π"))
    metrics = (
        *LOSS_METRICS,
        SumMetric(
            "shape/mean", "", "mean of γp/(p+γ)² over tokens of traces",
            of="shape", per="trace_tokens", panel="Shape of traces",
        ),
        SumMetric("shape/traces", "traces", "traces that were shaped", of="shaped_traces", panel="Shape of traces"),
    )  # fmt: skip

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        gamma = cfg.options.get("gamma", 0.1)
        if isinstance(gamma, str | dict) or gamma <= 0:
            raise ValueError(f"objective.options.gamma={gamma}: must be a positive number")
        self.gamma = float(gamma)

    def needs_rollouts(self, step: int) -> bool:
        return bool(self.cfg.options.get("rollouts", False))

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.DISTILL if group.tier in (None, Tier.HARD) else Treatment.REINFORCE

    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        if group[0].treatment is Treatment.REINFORCE:
            return WeightedGroup(weights=grpo_weights(group, totals, self.cfg, scale=1.0, step=step))
        (trace,) = group
        decay_R = np.linspace(1.0, 0.5, trace.num_response_tokens, dtype=np.float32)  # one value for each token
        share = 1 / (totals.num_prompts * length_divisor(trace, totals, self.cfg))  # one for all
        return WeightedGroup(weights=[{"shaped_weight": share * decay_R}], sums={"shaped_traces": 1.0})

    def loss_term(self, policy: PolicyTokens, x: LossInputs) -> tuple[Tensor, Sums]:
        p_N = policy.logp.detach().exp()
        shape_N = self.gamma * p_N / (p_N + self.gamma) ** 2
        loss = -(x["shaped_weight"] * shape_N * policy.logp).sum()
        return loss, {"shape": (shape_N * x["is_trace"]).sum()}
