"""How far the policy has moved from π_old: ratios of tokens and sequences, and where GAL stops for them. Pure.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.config.objective import LossConfig
from megatron_dypo.objective.ratios import clip_bounds
from megatron_dypo.objective.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Logarithms of ratios of π_θ to π_old, [N] each; 0 for a token that has no ratio."""

    log_ratio: Tensor
    """log r_t, without gradient; also of masked tokens, if it is finite."""
    drift: Tensor
    """Mean of ``log_ratio`` over the token's sequence."""
    log_rho: Tensor
    """log ρ, with gradient; 0 for masked tokens."""


def moves_from_old(
    logp_N: Tensor,
    current_N: Tensor,
    kept_N: Tensor,
    streams: Mapping[str, Tensor],
    sequences: Sequences,
    cfg: LossConfig,
) -> Moves:
    """Return the moves of each token. A trace's token has a ratio only if it has a pg weight.

    Args:
        logp_N: log π_θ of all tokens.
        current_N: log π_θ of the kept tokens, with gradient; 0 for masked tokens.
        kept_N: False for masked tokens.
    """
    old_N, has_ratio_N = streams["old_logp"], ~streams["is_trace"] | (streams["pg_weight"] != 0)
    log_rho_N = torch.where(has_ratio_N & kept_N, current_N - old_N, 0.0)
    log_ratio_N = shown(torch.where(has_ratio_N, logp_N.detach() - old_N, 0.0), kept_N)
    drift_N = sequences.mean(log_ratio_N)
    if cfg.ratio == "sequence":
        log_rho_N = torch.where(kept_N, drift_N, 0.0) + (log_rho_N - log_rho_N.detach())
    return Moves(log_ratio=log_ratio_N, drift=drift_N, log_rho=log_rho_N)


def gal_stops(moves: Moves, streams: Mapping[str, Tensor], cfg: LossConfig) -> Tensor:
    """Return [N] whether GAL has moved the ratio out of [1−ε_low, 1+ε_high] already, under ``gal_clip``."""
    if cfg.gal_clip == "none":
        return torch.zeros_like(streams["is_trace"])
    log_N, weight_N = moves.drift if cfg.gal_clip == "sequence" else moves.log_ratio, streams["nll_weight"]
    low, high = clip_bounds(cfg)
    too_far_N = torch.where(weight_N > 0, log_N > high, log_N < low)
    return too_far_N & (streams["gal_scale"] != 0) & (weight_N != 0)


def shown(value_N: Tensor, kept_N: Tensor) -> Tensor:
    """Return ``value_N`` for the metrics, with 0 for values of masked tokens that are not finite.

    Only the count of masked tokens shows those.
    """
    return torch.where(kept_N | value_N.isfinite(), value_N, 0.0)
