"""Intervals of estimates over prompts, by the jackknife. Pure: arrays in, numbers out.

Every estimate of the probe is a smooth function of sums over prompts and over pairs of different prompts. It is
computed with all prompts, and again without each one (or without each of at most ``MAX_BLOCKS`` random blocks, where
there are more prompts). The interval is Student's t with the jackknife's standard error: of variances and their
quotients on a logarithmic scale, of correlations on Fisher's, of a covariance from the intervals of its two factors.

The jackknife leaves pairs of different prompts different; a bootstrap has most prompts more than once, and pairs them
with themselves. With 30 prompts of 4 groups, 95% intervals of the moments covered the truth in 92% to 98% of 250 trials
(tests/unit/probe/test_moments.py), and with 32 to 128 prompts of the quickstart, of which 11 or more have a Mid group,
in 92% to 98% of 2,000 trials (``benchmarks/probe_coverage.py``). Where a tenth of the prompts has half of the variance,
16 prompts with a Mid group are too few for that: an estimate of a variance is then too low more often than its interval
says. A correlation above 0.98 is covered less often: what it lacks to 1 is due to few, rare groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import special

from megatron_dypo.probe.scores import Floats

CONFIDENCE = 0.95
MAX_BLOCKS = 400
MIN_PROMPTS = 3
"""With fewer prompts that have data, an estimate has no interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate with its 95% interval."""

    value: float | None
    """None if it cannot be computed, as the cosine of a vector whose estimated squared norm is negative."""
    low: float | None
    """Lower end; None if there is no interval."""
    high: float | None

    @property
    def is_certain(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None and self.high is not None

    def root(self) -> Estimate:
        """Return the estimate of the square root of a quantity that is not negative."""
        roots = (None if end is None else math.sqrt(max(end, 0.0)) for end in (self.value, self.low, self.high))
        value, low, high = roots
        return Estimate(value=value, low=low, high=high)


Scale = Literal["plain", "log", "fisher"]
_TO_SCALE: dict[Scale, Callable[[Floats], Floats]] = {"plain": np.asarray, "log": np.log, "fisher": np.arctanh}
_FROM_SCALE: dict[Scale, Callable[[float], float]] = {"plain": float, "log": math.exp, "fisher": math.tanh}
_WIDEST = math.log(1e9)
"""An interval of a positive quantity over more orders of magnitude than nine says nothing, and soon overflows."""
UNKNOWN = Estimate(value=None, low=None, high=None)
Tree: TypeAlias = Mapping[str, "Estimate | Tree | float | int | str | list[Tree] | None"]
"""Named estimates, in any depth."""


def jackknife_weights(num_prompts: int, seed: int = 0) -> Floats:
    """Return [B, P] weights of the prompts: the first row has all, each other row leaves out one block of prompts.

    Args:
        seed: of the random blocks, where there are more prompts than ``MAX_BLOCKS``.
    """
    blocks = min(num_prompts, MAX_BLOCKS)
    block_P = np.arange(num_prompts) % max(blocks, 1)
    if num_prompts > MAX_BLOCKS:
        block_P = np.random.default_rng(seed).permutation(block_P)
    return np.concatenate([np.ones((1, num_prompts)), np.arange(blocks)[:, None] != block_P]).astype(np.float64)


def estimate(
    values_B: Floats,
    *,
    informative: int,
    scale: Scale = "plain",
    least: float = -math.inf,
    largest: float = math.inf,
) -> Estimate:
    """Return the estimate with its interval.

    Args:
        values_B: [B] the estimate under each row of :func:`jackknife_weights`; the first is the estimate itself.
        informative: number of prompts that have data for it; the degrees of freedom are one less.
        scale: on which the interval is symmetric. ``log``: of a positive quantity. ``fisher``: of a cosine, by
            Fisher's transform, with the jackknife's correction of the bias: near 1 the quotient of unbiased estimates
            is often above 1. It is ``plain`` instead if a value is outside of the scale.
        least: smallest value that it can have; value and interval are cut there.
        largest: largest value.
    """
    value, others_B = float(values_B[0]), values_B[1:]
    others_B = others_B[np.isfinite(others_B)]
    if not math.isfinite(value):
        return UNKNOWN
    if scale == "fisher" and len(others_B):
        value -= (len(others_B) - 1) * (float(others_B.mean()) - value)
    cut = min(max(value, least), largest)
    count = min(informative, len(others_B))
    if count < MIN_PROMPTS or 2 * len(others_B) < len(values_B) - 1:
        return Estimate(value=cut, low=None, high=None)
    used: Scale = scale if _is_inside(np.append(others_B, value), scale) else "plain"
    centre = float(_TO_SCALE[used](np.array(value)))
    below, above = _half_widths(_TO_SCALE[used](others_B), count - 1)
    if used == "log" and below + above > _WIDEST:
        return Estimate(value=cut, low=None, high=None)
    low, high = (min(max(_FROM_SCALE[used](end), least), largest) for end in (centre - below, centre + above))
    return Estimate(value=cut, low=low, high=high)


def _half_widths(others_B: Floats, freedom: int) -> tuple[float, float]:
    """Return how far the interval reaches below and above the estimate.

    A few prompts with large influence make the standard error uncertain. So Student's t has no more degrees of freedom
    than a χ² whose relative variance is that of the squared standard error, by the kurtosis of the influences
    (Satterthwaite 1946); of normal data it has one for each prompt.

    With data that are skewed to the right, an estimate that is too low has a standard error that is too small. So the
    side of the longer tail is wider by Edgeworth's term of a studentised mean, a·(1 + 2t²), where a is the acceleration
    of Efron (1987) and t the quantile of ``freedom``, at most by t. The other side is left as it is.
    """
    error, quantile = standard_error(others_B), _quantile(freedom)
    influence_B, count = others_B.mean() - others_B, len(others_B)
    squares, cubes, fourths = (float((influence_B**power).sum()) for power in (2, 3, 4))
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    more = min(abs(acceleration) * (1 + 2 * quantile**2), quantile)
    excess = count * fourths / squares**2 - 1 if squares > 0 else 0.0
    if excess * freedom > 2 * count:
        quantile = _quantile(2 * count / excess)
    below, above = (more, 0.0) if acceleration < 0 else (0.0, more)
    return error * (quantile + below), error * (quantile + above)


def _quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def estimate_covariance(values_B: Floats, correlation: Estimate, size: Estimate) -> Estimate:
    """Return a covariance with an interval from those of its two factors.

    The estimate of a large covariance is as skewed as those of the variances, and has no scale of its own, because it
    may be negative. So the distances of the ends are those of the factors, added as if they were independent, by the
    method of variance estimates recovery (Donner and Zou 2012).

    Args:
        values_B: [B] the covariance under each row of :func:`jackknife_weights`.
        correlation: its first factor.
        size: the second factor, the geometric mean of the two variances.
    """
    ends = (correlation.low, correlation.high, size.value, size.low, size.high)
    value = float(values_B[0])
    if None in ends or not size.value or not math.isfinite(value):
        return Estimate(value=value if math.isfinite(value) else None, low=None, high=None)
    least, largest, scale, smallest, greatest = (float(end) for end in ends if end is not None)
    factor = min(max(value / scale, least), largest)
    inner, outer = abs(factor) * (scale - smallest), abs(factor) * (greatest - scale)
    below, above = (inner, outer) if factor >= 0 else (outer, inner)
    return Estimate(
        value=value,
        low=value - math.hypot(scale * (factor - least), below),
        high=value + math.hypot(scale * (largest - factor), above),
    )


def _is_inside(values: Floats, scale: Scale) -> bool:
    inside = {"plain": True, "log": bool((values > 0).all()), "fisher": bool((np.abs(values) < 1).all())}
    return inside[scale]


def standard_error(others_B: Floats) -> float:
    """Return the jackknife's standard error from the values that leave out one block each."""
    count = len(others_B)
    return math.sqrt((count - 1) / count * float(((others_B - others_B.mean()) ** 2).sum()))


def ratio(above_B: Floats, below_B: Floats) -> Floats:
    """Return the quotient, NaN where the denominator is not positive."""
    return np.asarray(np.divide(above_B, below_B, out=np.full(np.shape(below_B), np.nan), where=below_B > 0))


def pair_sums(weight_BP: Floats, product_PP: Floats, other_BP: Floats | None = None) -> Floats:
    """Return [B] Σ_{q≠q'} w_q·v_q'·K_qq', where v is ``other_BP`` or w."""
    different_PP = product_PP - np.diag(np.diag(product_PP))
    other_BP = weight_BP if other_BP is None else other_BP
    return np.asarray(np.einsum("bp,bp->b", weight_BP @ different_PP, other_BP))


def pair_counts(weight_BP: Floats) -> Floats:
    """Return [B] Σ_{q≠q'} w_q·w_q'."""
    return np.asarray(weight_BP.sum(axis=1) ** 2 - (weight_BP**2).sum(axis=1))


def to_plain(value: object) -> object:
    """Return estimates and other dataclasses, in mappings and lists, as plain dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number
    return [to_plain(one) for one in value] if isinstance(value, list | tuple) else value
