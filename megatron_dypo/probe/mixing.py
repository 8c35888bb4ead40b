"""Estimates about GRPO, GAL and their mix, with intervals: variances, the best α, signal-to-noise, the cosine."""

from __future__ import annotations

import numpy as np

from megatron_dypo.probe.moments import (
    PAIRS,
    Moments,
    Products,
    Scope,
    best_alpha,
    compute_moments,
    of_mix,
    signal_slope,
)
from megatron_dypo.probe.resample import Estimate, Scale, Tree, estimate, estimate_covariance, jackknife_weights, ratio
from megatron_dypo.probe.scores import Floats

GRID = tuple(round(0.1 * step, 1) for step in range(11))
"""The α at which the variance of the mix is reported."""
_FINE = np.linspace(0, 1, 101)


def estimate_moments(products: Products, alpha: float, scope: Scope, *, seed: int = 0) -> Tree:
    """Return all estimates in one scope.

    Args:
        alpha: the configured α.
        seed: of the jackknife's blocks.
    """
    moments = compute_moments(products, jackknife_weights(len(products.groups_P), seed), scope)
    names = {"grpo": "grpo", "gal": "gal", "both": "covariance"}
    parts = {
        "total": moments.total_B,
        "within_prompts": moments.within_B,
        "between_prompts": moments.between_B,
        "squared_mean": moments.mean_B,
    }
    found: dict[str, Tree] = {
        name: {names[pair]: _estimate(part[pair], moments, scale=_scale(name, pair)) for pair in PAIRS}
        for name, part in parts.items()
    }
    for name in ("total", "within_prompts"):
        found[name] = {**found[name], "covariance": _covariance(parts[name], moments)}
    return {
        "prompts": len(products.groups_P),
        "prompts_with_mid": moments.informative,
        **found,
        "ratios": _ratios(moments, alpha),
        "mix": _mix(moments, alpha),
        "signal_to_noise": _signal(moments, alpha),
        "cosine_of_means": _correlation(moments.mean_B, moments),  # unknown if a squared norm is estimated below 0
    }


def _scale(name: str, pair: str) -> Scale:
    """Return the scale of an interval: ``log`` for positive quantities whose estimates are rarely near 0."""
    return "log" if name in ("total", "within_prompts") and pair != "both" else "plain"


def _estimate(values_B: Floats, moments: Moments, *, scale: Scale = "plain", cut: bool = False) -> Estimate:
    ends = {"least": 0.0, "largest": 1.0} if cut else {}
    return estimate(values_B, informative=moments.informative, scale=scale, **ends)


def _ratios(moments: Moments, alpha: float) -> Tree:
    """Return quotients that the paper's claims are about."""
    total_B = moments.total_B
    return {
        "gal_to_grpo": _estimate(ratio(total_B["gal"], total_B["grpo"]), moments, scale="log"),
        "mix_to_grpo": _estimate(ratio(of_mix(total_B, alpha), total_B["grpo"]), moments, scale="log"),
        "signal_gal_to_grpo": _estimate(
            ratio(_signal_of(moments, 0.0), _signal_of(moments, 1.0)), moments, scale="log"
        ),
        "signal_mix_to_grpo": _estimate(
            ratio(_signal_of(moments, alpha), _signal_of(moments, 1.0)), moments, scale="log"
        ),
        "correlation": _correlation(total_B, moments),
        "correlation_within_prompts": _correlation(moments.within_B, moments),
    }


def _correlation(parts_B: dict[str, Floats], moments: Moments) -> Estimate:
    product_B = np.maximum(parts_B["grpo"], 0) * np.maximum(parts_B["gal"], 0)
    values_B = ratio(parts_B["both"], np.sqrt(product_B))
    return estimate(values_B, informative=moments.informative, scale="fisher", least=-1.0, largest=1.0)


def _covariance(parts_B: dict[str, Floats], moments: Moments) -> Estimate:
    """Return the covariance; it has no interval if the correlation or the variances have none."""
    size_B = np.sqrt(np.maximum(parts_B["grpo"], 0) * np.maximum(parts_B["gal"], 0))
    size = _estimate(size_B, moments, scale="log")
    return estimate_covariance(parts_B["both"], _correlation(parts_B, moments), size)


def _mix(moments: Moments, alpha: float) -> Tree:
    """Return the variance of the mix over α, and at the α that are best with and without the covariance."""
    variance_B = moments.total_B
    with_B, without_B = (best_alpha(variance_B, with_covariance=known) for known in (True, False))
    no_covariance_B = {**variance_B, "both": np.zeros_like(variance_B["both"])}
    return {
        "alpha": alpha,
        "variance": _estimate(of_mix(variance_B, alpha), moments, scale="log"),
        "grid": [{"alpha": one, "variance": _estimate(of_mix(variance_B, one), moments, scale="log")} for one in GRID],
        "best_alpha": _estimate(with_B, moments, cut=True),
        "variance_at_best": _estimate(of_mix(variance_B, np.clip(with_B, 0, 1)), moments, scale="log"),
        "best_alpha_without_covariance": _estimate(without_B, moments, cut=True),
        "variance_at_best_without_covariance": _estimate(
            of_mix(variance_B, np.clip(without_B, 0, 1)), moments, scale="log"
        ),
        "variance_claimed_without_covariance": _estimate(
            of_mix(no_covariance_B, np.clip(without_B, 0, 1)), moments, scale="log"
        ),
    }


def _signal(moments: Moments, alpha: float) -> Tree:
    """Return |mean|² / variance of one prompt's gradient; of n prompts it is n times that."""
    return {
        "grpo": _estimate(_signal_of(moments, 1.0), moments),
        "gal": _estimate(_signal_of(moments, 0.0), moments),
        "mix": _estimate(_signal_of(moments, alpha), moments),
        "best_alpha": _best_signal(moments),
    }


def _signal_of(moments: Moments, alpha: float) -> Floats:
    return ratio(of_mix(moments.mean_B, alpha), of_mix(moments.total_B, alpha))


def _best_signal(moments: Moments) -> Estimate:
    """Return the α in [0, 1] with the largest signal-to-noise ratio.

    A maximum at an end of [0, 1] stays there without any one prompt, so that the jackknife sees no uncertainty. So the
    interval has every α at which the sign of the derivative is not certain: a test of each α, inverted.
    """
    values = np.array([_signal_of(moments, alpha)[0] for alpha in _FINE])
    if not np.isfinite(values).all():
        return Estimate(value=None, low=None, high=None)
    slopes = [_estimate(signal_slope(moments, alpha), moments) for alpha in _FINE]
    value = float(_FINE[values.argmax()])
    kept = [value]
    for alpha, slope in zip(_FINE, slopes, strict=True):
        if slope.low is None or slope.high is None:
            return Estimate(value=value, low=None, high=None)
        rises, falls = slope.low > 0, slope.high < 0
        if not (rises or falls) or (alpha == 1 and rises) or (alpha == 0 and falls):
            kept.append(float(alpha))
    return Estimate(value=value, low=min(kept), high=max(kept))
