"""Jackknife intervals: against Student's t for a mean, coverage of a variance, and the cases without an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megatron_dypo.probe.resample import (
    MAX_BLOCKS,
    estimate,
    jackknife_weights,
    pair_counts,
    pair_sums,
    ratio,
    to_plain,
)
from tests.support.present import present


def test_of_a_mean_the_interval_is_students():
    half = np.random.default_rng(0).random(6)
    values = np.concatenate([half, 1 - half])  # without skewness
    weights = jackknife_weights(12)
    found = estimate(ratio(weights @ values, weights.sum(axis=1)), informative=12)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_side_of_the_longer_tail_is_wider():
    values = np.array([0.0] * 9 + [1.0])
    weights = jackknife_weights(10)
    for sign in (1, -1):
        found = estimate(ratio(weights @ (sign * values), weights.sum(axis=1)), informative=10)
        ends = sorted(abs(present(end) - sign * 0.1) for end in (found.low, found.high))
        quantile, error = stats.t.ppf(0.975, 9), stats.sem(values)
        # the third and second moments of nine values of −0.1 and one of 0.9
        acceleration = (9 * -(0.1**3) + 0.9**3) / (6 * (9 * 0.1**2 + 0.9**2) ** 1.5)
        assert ends == pytest.approx([error * quantile, error * (quantile + acceleration * (1 + 2 * quantile**2))])
        assert (present(found.high) - sign * 0.1 > sign * 0.1 - present(found.low)) == (sign > 0)


@pytest.mark.parametrize("num_prompts", [1, 5, MAX_BLOCKS, MAX_BLOCKS + 1, 3 * MAX_BLOCKS + 7])
def test_each_prompt_is_left_out_once(num_prompts):
    weights = jackknife_weights(num_prompts, seed=3)
    assert weights.shape == (min(num_prompts, MAX_BLOCKS) + 1, num_prompts)
    assert weights[0].all()
    assert ((weights[1:] == 0).sum(axis=0) == 1).all()
    left_out = (weights[1:] == 0).sum(axis=1)
    assert left_out.max() - left_out.min() <= 1


def test_blocks_of_prompts_give_an_interval_as_wide_as_single_prompts():
    values = np.random.default_rng(1).random(2000)
    weights = jackknife_weights(2000)
    found = estimate(ratio(weights @ values, weights.sum(axis=1)), informative=2000)
    width = 2 * 1.96 * stats.sem(values)
    assert present(found.high) - present(found.low) == pytest.approx(width, rel=0.15)


def test_intervals_of_a_variance_cover_it():
    weights, hits = jackknife_weights(20), []
    for seed in range(200):
        values = np.random.default_rng(seed).standard_normal(20)
        squares = ratio(weights @ values**2, weights.sum(axis=1))
        means = ratio(pair_sums(weights, np.outer(values, values)), pair_counts(weights))
        found = estimate(squares - means, informative=20, scale="log")
        hits.append(present(found.low) <= 1 <= present(found.high))
    assert np.mean(hits) >= 0.92


def test_sums_over_pairs_leave_out_each_prompt_with_itself():
    rng = np.random.default_rng(2)
    weights, products = rng.integers(0, 3, (4, 6)).astype(float), rng.random((6, 6))
    for row, w in enumerate(weights):
        naive = sum(w[i] * w[j] * products[i, j] for i in range(6) for j in range(6) if i != j)
        assert pair_sums(weights, products)[row] == pytest.approx(naive)
        assert pair_counts(weights)[row] == pytest.approx(
            sum(w[i] * w[j] for i in range(6) for j in range(6) if i != j)
        )


def test_value_and_interval_are_cut_at_the_ends():
    found = estimate(np.array([1.2, 0.5, 1.2, 1.9]), informative=3, least=0.0, largest=1.0)
    assert found.value == 1.0
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "informative"),
    [
        ([1.0, 1.0, 2.0, 3.0], 2),
        ([1.0, 1.0, 2.0], 5),
        ([1.0, 1.0, 2.0, 3.0, *[math.nan] * 4], 7),
    ],
)
def test_too_few_prompts_or_denominators_give_a_value_without_interval(values, informative):
    found = estimate(np.array(values), informative=informative)
    assert found.value == 1.0
    assert not found.is_certain


def test_a_value_that_is_not_known_has_no_interval():
    found = estimate(np.array([math.nan, 1.0, 2.0, 3.0]), informative=3)
    assert to_plain({"a": [found]}) == {"a": [{"value": None, "low": None, "high": None}]}


def test_a_value_outside_of_the_scale_gets_a_plain_interval():
    values = np.array([0.1, -0.2, 0.1, 0.4])
    assert estimate(values, informative=3, scale="log") == estimate(values, informative=3)
    found, plain = (estimate(values + 1, informative=3, scale=scale) for scale in ("fisher", "plain"))
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_the_jackknife_corrects_the_bias_of_a_cosine():
    found = estimate(np.array([0.5, 0.4, 0.5, 0.54]), informative=3, scale="fisher")
    assert found.value == pytest.approx(3 * 0.5 - 2 * (0.4 + 0.5 + 0.54) / 3)
    assert estimate(np.array([0.5, 0.4, 0.5, 0.54]), informative=3).value == 0.5


def test_an_interval_over_many_orders_of_magnitude_is_none_and_overflows_nowhere():
    values = np.array([1.0, *np.exp(np.linspace(-300, 300, 12))])
    found = estimate(values, informative=12, scale="log")
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_what_is_no_number_is_null_in_a_file():
    assert to_plain({"a": [math.inf, math.nan, 1.5], "b": -math.inf}) == {"a": [None, None, 1.5], "b": None}
