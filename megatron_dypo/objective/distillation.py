"""On-policy distillation: token weights from a teacher's log-probs of the policy's own rollouts. Pure.

Shape legend: G members of a group, R response tokens of one member, N response tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.loss import LossInputs, PolicyTokens, Sums
from megatron_dypo.objective.metrics import SumMetric
from megatron_dypo.objective.streams import Stream
from megatron_dypo.objective.token_weights import grpo_weights
from megatron_dypo.types import Floats, Sample, TokenWeights, Totals

OPD_STREAMS = (
    Stream(name="opd_weight", meaning="weight of −Â_t·log π_θ under objective.opd.estimator=reinforce"),
    Stream(name="teacher_logp", meaning="log π_T of the teacher", read=attrgetter("teacher_logp")),
)
OPD_METRICS = (
    SumMetric(
        "train/opd_reverse_kl", "nats/token", "mean log π_old − log π_T of rollouts that a teacher was asked about",
        of="opd_reverse_kl", per="opd_tokens",
    ),
    SumMetric(
        "train/opd_loss", "", "the REINFORCE term of objective.opd, weighted as in the objective",
        of="opd", where="opd_tokens",
    ),
)  # fmt: skip


def opd_weights(
    group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig, *, scale: float, step: int
) -> tuple[list[TokenWeights], dict[str, float]]:
    """Return the weights of ``scale``·L_OPD of one prompt's rollouts, and sums of ``OPD_METRICS``.

    Â_t = a·Â_i − λ·(log π_old − log π_T) enters the clipped surrogate. Under ``reinforce``, :func:`opd_term` subtracts
    the second part when it knows log π_θ.
    """
    opd, weights = cfg.opd, list[TokenWeights]()
    for sample, of_grpo in zip(group, grpo_weights(group, totals, cfg, scale=scale, step=step), strict=True):
        advantage, share = opd.reward_coef * of_grpo["advantage"], of_grpo["pg_weight"]
        if opd.estimator == "clipped":
            own: TokenWeights = {"advantage": advantage - opd.kl_coef * _log_ratio(sample)}
        else:
            own = {"advantage": advantage, "pg_weight": 0.0, "opd_weight": share}
        weights.append({**of_grpo, **own})
    return weights, {
        "opd_reverse_kl": sum(float(_log_ratio(sample).sum(dtype="float64")) for sample in group),
        "opd_tokens": float(sum(sample.num_response_tokens for sample in group)),
    }


def opd_term(policy: PolicyTokens, x: LossInputs, cfg: ObjectiveConfig) -> tuple[Tensor, Sums]:
    """Return −Σ opd_weight·u·sg(advantage − λ(log π_θ − log π_T))·log π_θ over the kept tokens, and its sum ``opd``.

    u is the weight of :mod:`megatron_dypo.objective.importance`.
    """
    is_on_N = policy.is_kept & (x["opd_weight"] != 0)
    log_ratio_N = torch.where(is_on_N, policy.logp.detach() - x["teacher_logp"], 0.0)
    advantage_N = x["advantage"] - cfg.opd.kl_coef * log_ratio_N
    weight_N = torch.where(is_on_N, x["opd_weight"] * policy.importance * advantage_N, 0.0)
    loss = -(weight_N * policy.logp).sum()
    return loss, {"opd": loss.detach()}


def _log_ratio(sample: Sample) -> Floats:
    """[R] log π_old − log π_T."""
    assert sample.old_logp is not None, "log-probs come before token weights"
    assert sample.teacher_logp is not None, "a group without a teacher's log-probs was dropped"
    return sample.old_logp - sample.teacher_logp
