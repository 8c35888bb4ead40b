"""Intervals and p-values of means over seeds and items. Pure: arrays in, numbers out.

Suffixes: K seeds (training runs) of a method; I items of an evaluation set; B resamples. A table ``scores_KI`` has the
score of each item under each seed, the mean over the item's samples.

Seeds and items are crossed: every run answers the same items. So a mean over both has two sources of noise, and more
of one does not reduce the other. There are many items, which are resampled. There are few seeds: a bootstrap over three
seeds may cover 83% instead of 95%, since it never sees values outside of the three. So the part of the seeds is drawn
from Student's t with the variance between seeds, without the variance that comes from items and sampling.
``benchmarks/interval_coverage.py`` measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_dypo.study.spec import RESAMPLES

Array = NDArray[np.float64]

CONFIDENCE = 0.95
_POWER_RATIO = float(stats.norm.ppf(0.8) / stats.norm.ppf(0.975))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean and its uncertainty."""

    mean: float
    sd: float | None
    """Standard deviation of the seeds' means; None with one seed."""
    low: float | None
    """Lower end of the 95% interval over seeds and items (with one seed, over items only); None if a set has fewer than
    two items."""
    high: float | None
    p: float | None
    """Two-sided p-value of the mean being 0, which belongs to the interval; None without an interval."""
    detectable: float | None
    """The true mean that a test at 5% distinguishes from 0 in four cases out of five, given the interval's width."""


def spread(tables: Sequence[Array], *, least: float = 0.0, seed: int = 0, resamples: int = RESAMPLES) -> Spread:
    """Return the mean over evaluation sets of the mean over seeds and items, with its interval.

    Args:
        tables: [K, I_d] for each set; all have the same seeds. Every set counts the same.
        least: smallest value that a mean can have, 0 or, of a difference, −1; the largest is 1. Intervals end there.
        seed: of the resampling.
    """
    means_K = np.mean([table.mean(axis=1) for table in tables], axis=0)
    mean, num_seeds = float(means_K.mean()), len(means_K)
    sd = float(means_K.std(ddof=1)) if num_seeds > 1 else None
    if min(table.shape[1] for table in tables) < 2:
        return Spread(mean=mean, sd=sd, low=None, high=None, p=None, detectable=None)
    draws_B = mean + _items_part(tables, seed, resamples)
    if num_seeds > 1:
        draws_B += math.sqrt(seeds_variance(tables) / num_seeds) * _student_draws(num_seeds - 1, seed, resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(end) for end in np.quantile(draws_B, [tail, 1 - tail]))
    below, above = (draws_B <= 0).sum() + 1, (draws_B >= 0).sum() + 1
    return Spread(
        mean=mean,
        sd=sd,
        low=max(low, least),
        high=min(high, 1.0),
        p=min(1.0, 2 * float(min(below, above)) / (resamples + 1)),
        detectable=(1 + _POWER_RATIO) * (high - low) / 2,
    )


def seeds_variance(tables: Sequence[Array]) -> float:
    """Return the variance between seeds without the contribution of items and sampling.

    It is the variance of the seeds' means, minus the residual variance of such a mean in a two-way table. With few
    seeds the difference is a poor estimate and may be negative, so at least 1/K of the whole variance is kept.
    """
    means_K = np.mean([table.mean(axis=1) for table in tables], axis=0)
    whole = float(means_K.var(ddof=1))
    residual = sum(_residual_variance(table) / table.shape[1] for table in tables) / len(tables) ** 2
    own: float = max(whole - residual, whole / len(means_K))
    return own


def _residual_variance(scores_KI: Array) -> float:
    num_seeds, num_items = scores_KI.shape
    rows, columns = scores_KI.mean(axis=1, keepdims=True), scores_KI.mean(axis=0, keepdims=True)
    rest = scores_KI - rows - columns + scores_KI.mean()
    residual: float = float((rest**2).sum()) / ((num_seeds - 1) * (num_items - 1))
    return residual


def _items_part(tables: Sequence[Array], seed: int, resamples: int) -> Array:
    """Return [B] deviations of the mean over items, as a bootstrap over the items of each set has them.

    They are multiplied by the ratio of the width of a t interval to that of a bootstrap with the same number of items
    (Hesterberg 2015, arXiv 1411.5279, "expanded percentile interval").
    """
    parts = np.zeros(resamples)
    for index, table in enumerate(tables):
        items_I = table.mean(axis=0)
        deviations_B = bootstrap_means(items_I, seed=seed + index, resamples=resamples) - items_I.mean()
        parts += deviations_B * expansion(len(items_I)) / len(tables)
    return parts


def bootstrap_means(items_I: Array, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return the means [B] of resamples of the items, by scipy."""
    found = stats.bootstrap(
        (items_I,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(items_I)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(found.bootstrap_distribution, dtype=np.float64)


def expansion(num_items: int) -> float:
    """Return how much wider than a bootstrap's the interval of a mean over this many items is to be."""
    tail = (1 + CONFIDENCE) / 2
    normal, student = stats.norm.ppf(tail), stats.t.ppf(tail, num_items - 1)
    return float(student / normal) * math.sqrt(num_items / (num_items - 1))


def _student_draws(freedom: int, seed: int, resamples: int) -> Array:
    """Return [B] draws of Student's t: its quantiles, evenly spaced, in random order.

    With few degrees of freedom, the tails then do not depend on chance.
    """
    quantiles_B = stats.t.ppf((np.arange(resamples) + 0.5) / resamples, freedom)
    return np.random.default_rng([seed, freedom]).permutation(quantiles_B)
