"""Jackknife intervals: against Student's t for a mean, coverage of a variance, and the cases without an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megatron_dypo.probe.resample import (
    MAX_BLOCKS,
    UNKNOWN,
    Estimate,
    estimate,
    estimate_covariance,
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
        kurtosis = 10 * (9 * 0.1**4 + 0.9**4) / (9 * 0.1**2 + 0.9**2) ** 2
        fewer = stats.t.ppf(0.975, 2 * 10 / (kurtosis - 1))
        # the third and second moments of nine values of −0.1 and one of 0.9
        acceleration = (9 * -(0.1**3) + 0.9**3) / (6 * (9 * 0.1**2 + 0.9**2) ** 1.5)
        assert ends == pytest.approx([error * fewer, error * (fewer + acceleration * (1 + 2 * quantile**2))])
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


def heavy_tailed(seed):
    """Return the sums of squares of two vectors of sizes with a heavy tail, and of their products, of each prompt."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((32, 2, 8)) * np.exp(rng.standard_normal(32))[:, None, None]
    first, second = noise[:, 0], 0.8 * noise[:, 0] + 0.6 * noise[:, 1]
    return [(a * b).sum(axis=1) for a, b in ((first, first), (second, second), (first, second))]


def test_intervals_of_quotients_of_heavy_tailed_sums_cover_them():
    weights, hits = jackknife_weights(32), []
    for seed in range(300):
        first, second, both = (weights @ values for values in heavy_tailed(seed))
        quotient = estimate(second / first, informative=32, scale="log")
        correlation = estimate(both / np.sqrt(first * second), informative=32, scale="fisher")
        hits.append(
            [present(one.low) <= truth <= present(one.high) for one, truth in ((quotient, 1), (correlation, 0.8))]
        )
    assert np.mean(hits, axis=0).min() >= 0.9


def test_a_heavy_tailed_covariance_is_covered_as_often_as_the_variances():
    weights, hits = jackknife_weights(32), []
    for seed in range(300):
        first, second, both = (weights @ values / weights.sum(axis=1) for values in heavy_tailed(seed))
        size = np.sqrt(first * second)
        found = estimate_covariance(
            both, estimate(both / size, informative=32, scale="fisher"), estimate(size, informative=32, scale="log")
        )
        plain = estimate(both, informative=32)
        truths = (0.8 * 8 * np.exp(2), 0.8 * 8 * np.exp(2), 8 * np.exp(2))
        ends = (found, plain, estimate(first, informative=32, scale="log"))
        if all(one.is_certain for one in ends):  # not if one prompt is nearly all
            hits.append(
                [present(one.low) <= truth <= present(one.high) for one, truth in zip(ends, truths, strict=True)]
            )
    assert len(hits) >= 290
    covered, on_a_plain_scale, variances = np.mean(hits, axis=0)
    assert covered >= variances - 0.02
    assert covered >= on_a_plain_scale + 0.05


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_a_covariance_adds_the_distances_of_its_factors(sign):
    correlation = Estimate(value=sign * 0.5, low=min(sign * 0.3, sign * 0.6), high=max(sign * 0.3, sign * 0.6))
    found = estimate_covariance(np.array([sign * 2.0]), correlation, Estimate(value=4.0, low=3.0, high=8.0))
    near, far = math.hypot(4 * 0.2, 0.5 * 1), math.hypot(4 * 0.1, 0.5 * 4)
    assert found.value == sign * 2.0
    assert sorted((present(found.low), present(found.high)), key=abs) == pytest.approx(
        [sign * (2 - near), sign * (2 + far)]
    )


def test_a_covariance_without_a_correlation_or_a_size_has_no_interval():
    known = Estimate(value=1.0, low=0.5, high=2.0)
    for factors in ((UNKNOWN, known), (known, UNKNOWN)):
        assert estimate_covariance(np.array([1.5]), *factors) == Estimate(value=1.5, low=None, high=None)


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
