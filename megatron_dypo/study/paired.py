"""Paired tests of two methods on the same items, and the correction for many of them. Pure: arrays in, numbers out.

Suffixes: K seeds, I items, N tests. These tests only compare the given runs item by item and do not account for other
seeds. :func:`megatron_dypo.study.resampling.spread` of the differences does, and decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from megatron_dypo.study.resampling import Array
from megatron_dypo.study.spec import RESAMPLES


def permutation_p(differences_I: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p-value of a paired permutation test, in which each item's difference may change its
    sign."""
    found = stats.permutation_test(
        (differences_I,),
        _mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(differences_I)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _mean(values: Array, axis: int) -> Array:
    return np.asarray(np.mean(values, axis=axis))


def wilcoxon_p(differences_I: Array) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 if no item differs."""
    return float(stats.wilcoxon(differences_I).pvalue) if differences_I.any() else 1.0


def mcnemar_p(first_I: Array, second_I: Array) -> float:
    """Return the two-sided p-value of McNemar's exact test: a binomial test of the items that only one method solves.

    Args:
        first_I: [I] 0 or 1 for each item: one response of one run.
        second_I: the same of the other method.
    """
    only_first = int(((first_I == 1) & (second_I == 0)).sum())
    only_second = int(((first_I == 0) & (second_I == 1)).sum())
    disagreements = only_first + only_second
    return float(stats.binomtest(only_first, disagreements).pvalue) if disagreements else 1.0


def holm(p_N: Sequence[float]) -> list[float]:
    """Return the p-values, adjusted so that the chance of any false finding among all N stays below the level.

    The i-th smallest is multiplied by N − i + 1, and then raised to at least its predecessor (Holm 1979).
    """
    adjusted, largest = [0.0] * len(p_N), 0.0
    for rank, index in enumerate(sorted(range(len(p_N)), key=lambda index: p_N[index])):
        largest = max(largest, min(1.0, p_N[index] * (len(p_N) - rank)))
        adjusted[index] = largest
    return adjusted
