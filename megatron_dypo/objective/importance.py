"""Corrections for a mismatch of trainer and servers: a weight and masks for each token. Pure.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.config.objective import ImportanceConfig
from megatron_dypo.objective.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Weight and masks of each token; every field is [N] and without gradient."""

    weight: Tensor
    """Weight of the policy gradient: min(u, cap), or 1."""
    is_kept: Tensor
    """False: the token contributes nothing."""
    is_capped: Tensor
    """True: the cap replaced u."""
    is_token_masked: Tensor
    is_sequence_masked: Tensor


def importance(log_u_N: Tensor, is_rollout_N: Tensor, sequences: Sequences, cfg: ImportanceConfig) -> Importance:
    """Return truncated importance weights (Yao et al. 2025), IcePop's masks (Ling Team 2025), masks of whole rollouts.

    A token is kept only if its value is inside the bounds, so NaN is masked. Only rollouts are weighted, capped or
    masked.

    Args:
        log_u_N: [N] log π_old − log π_rollout.
        is_rollout_N: [N] False on tokens that were not sampled.
    """
    log_u_N = torch.where(is_rollout_N, log_u_N, 0.0)
    none_N = torch.zeros_like(is_rollout_N)
    weight_N, is_capped_N = torch.ones_like(log_u_N), none_N
    if cfg.cap is not None:
        is_capped_N = is_rollout_N & (log_u_N > math.log(cfg.cap))
        weight_N = torch.where(is_capped_N, cfg.cap, log_u_N.exp())
    token_N = none_N if cfg.token_bounds is None else is_rollout_N & ~_inside(log_u_N, cfg.token_bounds)
    sequence_N = none_N
    if cfg.sequence_bounds is not None:
        sequence_N = is_rollout_N & ~_inside(sequences.mean(log_u_N), cfg.sequence_bounds)
    if cfg.sequence_max_gap is not None:
        sequence_N = sequence_N | (is_rollout_N & ~(sequences.mean(log_u_N.abs()) <= cfg.sequence_max_gap))
    return Importance(
        weight=weight_N,
        is_kept=~(token_N | sequence_N),
        is_capped=is_capped_N,
        is_token_masked=token_N,
        is_sequence_masked=sequence_N,
    )


def _inside(log_N: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return (log_N >= (math.log(low) if low > 0 else -math.inf)) & (log_N <= math.log(high))
