"""Metrics that an objective declares: named sums of its loss and of its groups, and how they divide. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_dypo.metrics.names import Metric


@dataclass(frozen=True, kw_only=True)
class SumMetric(Metric):
    """A metric of an update: one sum over the global batch, or the ratio of two.

    The loss returns sums over its tokens, and ``WeightedGroup.sums`` holds sums over groups. Sums of one name are added
    up.
    """

    of: str
    """The sum."""
    per: str | None = None
    """The sum that divides it; None: 1. The metric is left out of a step in which that sum is 0."""
    where: str | None = None
    """Another sum. The metric is left out of a step in which it is 0."""


def sum_metrics(metrics: Iterable[SumMetric], sums: Mapping[str, float]) -> dict[str, float]:
    """Return name → value of each metric whose sums are in ``sums``."""
    values = {}
    for metric in metrics:
        needed = [name for name in (metric.per, metric.where) if name is not None]
        if metric.of in sums and all(sums.get(name) for name in needed):
            values[metric.name] = sums[metric.of] / (sums[metric.per] if metric.per else 1.0)
    return values


LOSS_METRICS = (
    SumMetric("train/loss", "", "the whole objective, summed over the global batch", of="objective"),
    SumMetric(
        "train/pg_loss", "", "its GRPO term (clipped surrogate), weighted as in the objective",
        of="pg", where="rollout_tokens",
    ),
    SumMetric(
        "train/sft_loss", "nats", "its distillation term, weighted as in the objective", of="sft", where="trace_tokens"
    ),
    SumMetric(
        "train/rollout_nll_loss", "nats", "its −log π of rollouts that is not GAL's, weighted as in the objective",
        of="rollout_nll", where="rollout_nll",
    ),
    SumMetric(
        "train/entropy_bonus", "nats", "its entropy bonus (negative), weighted as in the objective",
        of="entropy_bonus", where="entropy_bonus",
    ),
    SumMetric(
        "train/kl_loss", "nats", "its k3 estimate of KL(π_θ‖π_ref), weighted as in the objective",
        of="kl", where="rollout_tokens",
    ),
    SumMetric(
        "train/sft_nll", "nats/token", "mean −log π_θ over the tokens of teachers' traces",
        of="trace_nll", per="trace_tokens",
    ),
    SumMetric(
        "train/entropy", "nats/token", "mean entropy of π_θ over response tokens of rollouts",
        of="entropy", per="rollout_tokens",
    ),
    SumMetric(
        "train/pg_clipfrac", "fraction", "tokens of GRPO whose ratio was clipped", of="clipped", per="rollout_tokens"
    ),
    SumMetric(
        "train/ppo_kl", "nats/token", "mean of log π_old − log π_θ over tokens of rollouts",
        of="ppo_kl", per="rollout_tokens",
    ),
    SumMetric(
        "train/importance_capped_ratio", "fraction", "tokens of rollouts whose importance weight hit the cap",
        of="importance_capped", per="rollout_tokens",
    ),
    SumMetric(
        "train/importance_masked_ratio", "fraction", "tokens of rollouts outside objective.importance.token_bounds",
        of="importance_masked", per="rollout_tokens",
    ),
    SumMetric(
        "train/importance_masked_rollouts_ratio", "fraction", "rollouts that objective.importance masks whole",
        of="rollouts_masked", per="rollouts",
    ),
)  # fmt: skip
"""The metrics of every objective that uses :func:`megatron_dypo.objective.loss.token_loss`."""
