"""Intervals over seeds and items, against scipy for one level and Student's t without items; coverage by simulation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from megatron_dypo.study.resampling import Spread, expansion, seeds_variance, spread
from megatron_dypo.study.spec import RESAMPLES
from tests.support.present import present


def accuracies(rng, seeds, items, samples, *, of_seeds):
    """Draw scores of runs on items; a logit sums terms of the item, of the run, and of both together."""
    logits = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, 1.5, (1, items)) + rng.normal(0, 0.5, (seeds, items))
    return rng.binomial(samples, 1 / (1 + np.exp(-logits))) / samples  # mean 1/2, by symmetry


def width(found: Spread) -> float:
    return present(found.high) - present(found.low)


def holds(found: Spread, value: float) -> bool:
    return present(found.low) <= value <= present(found.high)


def test_of_one_seed_the_interval_is_scipys_bootstrap_over_items_made_wider_for_few_items():
    items = np.random.default_rng(5).random(30)
    found = spread([items[None]])
    theirs = stats.bootstrap(
        (items,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    for ours, end in ((found.low, theirs.low), (found.high, theirs.high)):
        assert ours == pytest.approx(items.mean() + (end - items.mean()) * expansion(30), abs=1e-9)
    assert found.sd is None


def test_the_factor_for_few_items_turns_a_normal_interval_of_the_biased_deviation_into_the_t_interval():
    items = np.random.default_rng(1).random(12)
    biased = items.std(ddof=0) / math.sqrt(12)
    low, _ = stats.t.interval(0.95, 11, loc=items.mean(), scale=stats.sem(items))
    assert items.mean() - 1.959963984540054 * biased * expansion(12) == pytest.approx(low, abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_where_all_items_are_alike_the_interval_is_students_over_the_seeds(seeds):
    means = 0.5 + 0.01 * np.random.default_rng(seeds).standard_normal(seeds)
    found = spread([np.repeat(means[:, None], 50, axis=1)])
    low, high = stats.t.interval(0.95, seeds - 1, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high), rel=2e-3)
    assert found.sd == pytest.approx(statistics.stdev(means), abs=1e-12)
    assert found.mean == pytest.approx(means.mean(), abs=1e-12)


def test_the_variance_of_seeds_is_that_of_a_two_way_table_computed_naively():
    scores = np.random.default_rng(3).random((4, 9)) + np.arange(4)[:, None]
    rows = [statistics.fmean(row) for row in scores.tolist()]
    columns = [statistics.fmean(column) for column in scores.T.tolist()]
    whole = statistics.fmean(rows)
    rest = sum((scores[k, i] - rows[k] - columns[i] + whole) ** 2 for k in range(4) for i in range(9)) / (3 * 8)
    assert seeds_variance([scores]) == pytest.approx(statistics.variance(rows) - rest / 9, abs=1e-9)


def test_no_less_than_the_share_of_one_seed_is_kept_of_the_variance_between_seeds():
    scores = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.1]])
    assert seeds_variance([scores]) == pytest.approx(np.var(scores.mean(axis=1), ddof=1) / 2, abs=1e-12)


def test_an_average_of_sets_is_the_mean_of_their_means_and_narrower_than_each():
    rng = np.random.default_rng(0)
    tables = [accuracies(rng, 3, items, 4, of_seeds=0.0) for items in (40, 80)]
    found = spread(tables)
    singles = [spread([table]) for table in tables]
    assert found.mean == pytest.approx(statistics.fmean(one.mean for one in singles), abs=1e-12)
    assert width(found) < min(width(one) for one in singles)


def test_the_interval_leaves_out_zero_just_when_p_is_below_the_level():
    rng = np.random.default_rng(2)
    for shift in np.linspace(-0.3, 0.3, 13):
        found = spread([rng.normal(shift, 0.3, (3, 25))], least=-1.0, resamples=999)
        assert (present(found.p) < 0.05) == (not holds(found, 0.0))


def test_intervals_end_where_a_mean_must():
    found = spread([np.array([[0.0, 1.0], [1.0, 1.0]])])
    assert found.high == 1.0
    assert present(found.low) >= 0.0
    assert spread([np.ones((2, 1))]).low is None


def test_the_same_scores_give_the_same_interval():
    scores = accuracies(np.random.default_rng(4), 3, 30, 2, of_seeds=0.2)
    assert spread([scores]) == spread([scores])


def test_intervals_cover_the_truth_as_often_as_they_say():
    # benchmarks/interval_coverage.py does this with more repetitions and settings.
    rng, runs = np.random.default_rng(7), 250
    found = [spread([accuracies(rng, 3, 60, 8, of_seeds=0.4)], resamples=199) for _ in range(runs)]
    covered = sum(holds(one, 0.5) for one in found) / runs
    assert 0.92 <= covered <= 0.98, covered


def test_resampling_three_seeds_would_cover_too_seldom():
    rng, runs = np.random.default_rng(7), 400
    covered = 0
    for _ in range(runs):
        scores = accuracies(rng, 3, 60, 8, of_seeds=0.4)
        drawn = scores[rng.integers(0, 3, (399, 3))[:, :, None], rng.integers(0, 60, (399, 60))[:, None, :]]
        low, high = np.quantile(drawn.mean(axis=(1, 2)), [0.025, 0.975])
        covered += low <= 0.5 <= high
    assert covered / runs < 0.9
