"""The token-local loss: a plain sum, blind to which objective made the weights (dypo.md, section 5). Pure.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.config import ObjectiveConfig

STATISTICS = (
    "surrogate", "kl", "sft", "trace_nll", "tokens", "rollout_tokens", "entropy", "clipped", "ppo_kl",
    "mismatch_abs", "importance_capped",
)  # fmt: skip
"""Names of the sums that :func:`token_loss` returns, in its order."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What one microbatch's response tokens carry; every field is [N] and without gradient."""

    advantage: Tensor
    surrogate: Tensor
    kl: Tensor
    nll: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    is_trace: Tensor


def token_loss(logp_N: Tensor, entropy_N: Tensor, x: LossInputs, cfg: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Σ_t surrogate·L_clip + kl·k3 − nll·log π, and the sums for the log.

    L_clip = −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A) with ρ = π_θ/π_old (eq. 22), bounded by −c·A where A < 0 under
    dual clip, times min(π_old/π_rollout, cap) under truncated importance sampling; k3 = e^δ − δ − 1 with
    δ = log π_ref − log π_θ.

    Args:
        logp_N: [N] log π_θ of the response tokens, with gradient.
        entropy_N: [N], for the log.

    Returns:
        The scalar loss, attached to the graph even where N = 0, and [len(STATISTICS)] float64 sums over the tokens
        (``surrogate``, ``kl``, ``sft`` are sums of weighted losses, the others plain sums or counts).
    """
    is_rollout_N = ~x.is_trace
    log_ratio_N = torch.where(is_rollout_N, logp_N - x.old_logp, 0.0)
    clip_N, is_clipped_N = _clipped_surrogate(log_ratio_N, x.advantage, cfg)
    importance_N = torch.where(is_rollout_N, x.old_logp - x.rollout_logp, 0.0).exp()
    if cfg.importance_cap is not None:
        clip_N = clip_N * importance_N.clamp(max=cfg.importance_cap)
    delta_N = torch.where(x.kl != 0, x.ref_logp - logp_N, 0.0)
    k3_N = delta_N.exp() - delta_N - 1

    loss_surrogate_N, loss_kl_N, loss_nll_N = x.surrogate * clip_N, x.kl * k3_N, -x.nll * logp_N
    loss = (loss_surrogate_N + loss_kl_N + loss_nll_N).sum()
    capped_N = importance_N > (cfg.importance_cap if cfg.importance_cap is not None else float("inf"))
    sums = (
        loss_surrogate_N, loss_kl_N, torch.where(x.is_trace, loss_nll_N, 0.0),
        torch.where(x.is_trace, -logp_N, 0.0), torch.ones_like(logp_N), is_rollout_N,
        torch.where(is_rollout_N, entropy_N, 0.0), is_clipped_N & (x.surrogate != 0), -log_ratio_N,
        torch.where(is_rollout_N, (x.old_logp - x.rollout_logp).abs(), 0.0), capped_N,
    )  # fmt: skip
    return loss, torch.stack([s.detach().double().sum() for s in sums])


def _clipped_surrogate(log_ratio_N: Tensor, advantage_N: Tensor, cfg: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """[N] loss, and [N] where a bound replaced the ratio (its gradient is zero there)."""
    ratio_N = log_ratio_N.exp()
    plain_N = -ratio_N * advantage_N
    bounded_N = -ratio_N.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage_N
    loss_N, is_clipped_N = torch.maximum(plain_N, bounded_N), bounded_N > plain_N
    if cfg.dual_clip is not None:
        limit_N = torch.where(advantage_N < 0, -cfg.dual_clip * advantage_N, float("inf"))
        is_clipped_N = is_clipped_N | (loss_N > limit_N)
        loss_N = torch.minimum(loss_N, limit_N)
    return loss_N, is_clipped_N
