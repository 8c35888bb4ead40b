"""Ratios of probabilities from their logarithms, without overflow: exponentials, clipped surrogate, k3. Pure.

Comparisons use the logarithms. Every exponential is finite, even if a bound replaces it afterwards: a gradient of 0
times an infinite ratio would be NaN. Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dypo.config.objective import LOG_RATIO_LIMIT, LossConfig


def bounded_exp(log_N: Tensor) -> Tensor:
    """Return [N] e^x, and its tangent above :data:`LOG_RATIO_LIMIT`, so that value and gradient stay finite in fp32."""
    return _continued(torch.exp, log_N)


def bounded_k3(delta_N: Tensor) -> Tensor:
    """Return [N] e^δ − δ − 1, with the tangent of :func:`bounded_exp`. It is accurate near δ = 0, where the plain
    difference would cancel."""
    return _continued(torch.expm1, delta_N) - delta_N


def clip_bounds(cfg: LossConfig) -> tuple[float, float]:
    """Return the logarithms of 1 − ε_low and 1 + ε_high; −∞ and ∞ where there is no bound."""
    low = -math.inf if cfg.clip_low is None else math.log1p(-cfg.clip_low)
    return low, math.inf if cfg.clip_high is None else math.log1p(cfg.clip_high)


def clipped_surrogate(log_ratio_N: Tensor, advantage_N: Tensor, cfg: LossConfig) -> tuple[Tensor, Tensor]:
    """Return −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), at most −c·A where A < 0 under dual clip.

    Returns:
        [N] loss, and [N] whether a bound replaced the ratio: the gradient is zero there, however large the ratio is.
    """
    log_low, log_high = clip_bounds(cfg)
    is_up_N, is_down_N = advantage_N > 0, advantage_N < 0
    is_clipped_N = (is_up_N & (log_ratio_N > log_high)) | (is_down_N & (log_ratio_N < log_low))
    # A bound of None is never chosen, so its value here does not matter.
    high, low = (1 + (bound or 0.0) for bound in (cfg.clip_high, -(cfg.clip_low or 0.0)))
    bound_N = torch.where(is_up_N, high, torch.full_like(advantage_N, low))
    if cfg.dual_clip is not None:
        is_limited_N = is_down_N & (log_ratio_N > math.log(cfg.dual_clip))
        is_clipped_N = is_clipped_N | is_limited_N
        bound_N = torch.where(is_limited_N, cfg.dual_clip, bound_N)
    ratio_N = torch.where(is_clipped_N, bound_N, bounded_exp(log_ratio_N))
    return -ratio_N * advantage_N, is_clipped_N


def _continued(function: Callable[[Tensor], Tensor], log_N: Tensor) -> Tensor:
    """Return ``function``, whose derivative is e^x, continued by its tangent from LOG_RATIO_LIMIT on."""
    is_far_N = log_N > LOG_RATIO_LIMIT
    near_N = function(torch.where(is_far_N, LOG_RATIO_LIMIT, log_N))
    return near_N + torch.where(is_far_N, math.exp(LOG_RATIO_LIMIT) * (log_N - LOG_RATIO_LIMIT), 0.0)
