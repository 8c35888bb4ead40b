"""The token-local loss: a plain sum, blind to which objective made the weights (dypo.md, section 5). Pure.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.importance import Importance, importance
from megatron_dypo.objective.ratios import bounded_k3, clipped_surrogate
from megatron_dypo.objective.sequences import Sequences

STATISTICS = (
    "surrogate", "kl", "sft", "trace_nll", "tokens", "rollout_tokens", "entropy", "clipped", "ppo_kl",
    "mismatch_abs", "importance_capped", "importance_masked", "rollouts", "rollouts_masked",
    "anchored_tokens", "anchored_clipped", "anchored", "anchor_drift",
)  # fmt: skip
"""Names of the sums that :func:`token_loss` returns, in its order."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What one microbatch's response tokens carry; every tensor is [N] and without gradient."""

    advantage: Tensor
    surrogate: Tensor
    kl: Tensor
    nll: Tensor
    anchor: Tensor
    """1/divisor of the log-ratio by which ``nll`` is a derivative (GAL); 0 where ``nll`` is a constant."""
    old_logp: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    is_trace: Tensor
    sequence: Tensor
    """int64, in [0, num_sequences)."""
    num_sequences: int


def token_loss(
    logp_N: Tensor,
    entropy_N: Tensor,
    x: LossInputs,
    cfg: ObjectiveConfig,
    across: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_t surrogate·u·L_clip + kl·k3 − nll·log π over the tokens that ``cfg.importance`` keeps, and sums for the log.

    - L_clip = −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A), bounded by −c·A where A < 0 under dual clip (eq. 22). ρ is
      r_t = π_θ/π_old of the token, or s = exp(mean of log r over its sequence) with gradient s·∇log π: GSPO's, for
      surrogate weights that are the same on all tokens of a sequence (arXiv 2507.18071, sections 4.1, 4.3).
    - u and the masks are those of :mod:`megatron_dypo.objective.importance`; a masked token adds nothing at all, were its
      log-probs NaN. Where a kept token reads a value that is not finite, loss and gradient are NaN.
    - k3 = e^δ − δ − 1 with δ = log π_ref − log π_θ.
    - From a ratio (ρ or π_ref/π_θ) of e^20 on, e^x is continued by its tangent (``LOG_RATIO_LIMIT``): the gradient of what
      no clip bounds stays finite, and keeps its direction.
    - Under ``gal_clip`` an anchored nll (GAL) is 0 where the ratio, r_t or s, has left the trust region in the
      direction of its push: above 1+ε_high where nll > 0, below 1−ε_low where nll < 0.

    Args:
        logp_N: [N] log π_θ of the response tokens, with gradient.
        entropy_N: [N], for the log.
        across: see :class:`Sequences`.

    Returns:
        The scalar loss, attached to the graph even where N = 0, and [len(STATISTICS)] float64 sums over the tokens:
        ``surrogate``, ``kl``, ``sft`` of weighted losses; ``rollouts``, ``rollouts_masked``, ``anchored`` count
        sequences; ``anchor_drift`` is Σ over anchored sequences of |ℓ_θ − ℓ_old|; the others plain sums or counts.
    """
    sequences = Sequences(x.sequence, x.num_sequences, across)
    is_rollout_N = ~x.is_trace
    log_u_N = torch.where(is_rollout_N, x.old_logp - x.rollout_logp, 0.0)
    correction = importance(log_u_N, is_rollout_N, sequences, cfg.importance)
    kept_N, current_N = correction.is_kept, _kept_logp(logp_N, x, correction)
    log_ratio_N = torch.where(is_rollout_N & kept_N, current_N - x.old_logp, 0.0)
    moved_N = _shown(torch.where(is_rollout_N, logp_N.detach() - x.old_logp, 0.0), kept_N)
    drift_N = sequences.mean(moved_N)
    log_rho_N = log_ratio_N
    if cfg.ratio == "sequence":
        log_rho_N = torch.where(kept_N, drift_N, 0.0) + (log_ratio_N - log_ratio_N.detach())
    clip_N, is_clipped_N = clipped_surrogate(log_rho_N, x.advantage, cfg)
    delta_N = torch.where((x.kl != 0) & kept_N, x.ref_logp - current_N, 0.0)
    is_stopped_N = _left_trust_region(moved_N, drift_N, x, cfg)
    nll_N = torch.where(kept_N & ~is_stopped_N, x.nll, 0.0)

    loss_surrogate_N = torch.where(kept_N, x.surrogate * correction.weight, 0.0) * clip_N
    loss_kl_N, loss_nll_N = x.kl * bounded_k3(delta_N), -nll_N * current_N
    loss = (loss_surrogate_N + loss_kl_N + loss_nll_N).sum()
    is_anchored_N = x.anchor != 0
    sums = (
        loss_surrogate_N, loss_kl_N, torch.where(x.is_trace, loss_nll_N, 0.0),
        torch.where(x.is_trace, -current_N, 0.0), torch.ones_like(logp_N), is_rollout_N,
        torch.where(is_rollout_N, _shown(entropy_N, kept_N), 0.0), is_clipped_N & kept_N & (x.surrogate != 0), -moved_N,
        _shown(log_u_N, kept_N).abs(), correction.is_capped,
        correction.is_token_masked, is_rollout_N * sequences.share_N, correction.is_sequence_masked * sequences.share_N,
        is_anchored_N, is_stopped_N, is_anchored_N * sequences.share_N, (drift_N * x.anchor).abs(),
    )  # fmt: skip
    return loss, torch.stack([s.detach().double().sum() for s in sums])


def _kept_logp(logp_N: Tensor, x: LossInputs, correction: Importance) -> Tensor:
    """[N] log π_θ of the tokens that are kept, 0 of those that are masked.

    Where a kept token reads anything that is not finite, value *and gradient* are NaN, whatever its weights are: a clip
    or a weight of 0 would hide it, and the optimizer looks at gradients.
    """
    reads_N = logp_N.detach() + x.advantage + x.surrogate + x.kl + x.nll + correction.weight
    reads_N = reads_N + torch.where(x.is_trace, 0.0, x.old_logp) + torch.where(x.kl != 0, x.ref_logp, 0.0)
    factor_N = torch.where(correction.is_kept & ~reads_N.isfinite(), math.nan, torch.ones_like(reads_N))
    return torch.where(correction.is_kept, logp_N * factor_N, 0.0)


def _shown(value_N: Tensor, kept_N: Tensor) -> Tensor:
    """``value_N``, with 0 for what is not finite on a masked token: it is counted as masked, and says nothing else."""
    return torch.where(kept_N | value_N.isfinite(), value_N, 0.0)


def _left_trust_region(
    log_ratio_N: Tensor, sequence_log_ratio_N: Tensor, x: LossInputs, cfg: ObjectiveConfig
) -> Tensor:
    """[N] where an anchored nll has pushed the ratio out of [1−ε_low, 1+ε_high] already."""
    if cfg.gal_clip == "none":
        return torch.zeros_like(x.is_trace)
    log_N = sequence_log_ratio_N if cfg.gal_clip == "sequence" else log_ratio_N
    too_far_N = torch.where(x.nll > 0, log_N > math.log1p(cfg.clip_high), log_N < math.log1p(-cfg.clip_low))
    return too_far_N & (x.anchor != 0) & (x.nll != 0)
