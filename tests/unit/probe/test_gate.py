"""The gate as a scalar: unbiased products against loops over different prompts, and known covariances."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megatron_dypo.probe.gate import GatedProducts, estimate_gate, hard_gate, mid_gate
from megatron_dypo.probe.gradients import Setting, make_groups
from megatron_dypo.probe.moments import make_products
from tests.support.probe_cases import Population, draw_rollouts, naive_gradients, to_scores

SETTING = Setting(group_size=4, length_normalization="sum")
DIMENSIONS = 5


def population(rng, prompts, *, coupling):
    """Draw chances h in (0, 1) and gradients of mean (1, …) whose first coordinate goes with h."""
    chance = rng.uniform(0.2, 0.8, prompts)
    gradient = 1 + 0.5 * rng.standard_normal((prompts, DIMENSIONS))
    gradient[:, 0] += coupling * (chance - 0.5)
    return chance, gradient


def estimates(chance, gradient) -> Any:
    return estimate_gate(GatedProducts(chance_P=chance, product_PP=gradient @ gradient.T))


def mean_over_different(terms):
    return np.mean(list(terms))


def test_products_equal_loops_over_different_prompts():
    chance, gradient = population(np.random.default_rng(0), 6, coupling=3.0)
    gram = gradient @ gradient.T
    gated = mean_over_different(chance[i] * chance[j] * gram[i, j] for i, j in itertools.permutations(range(6), 2))
    cross = mean_over_different(chance[i] * chance[j] * gram[i, k] for i, j, k in itertools.permutations(range(6), 3))
    plain = mean_over_different(
        chance[i] * chance[j] * gram[k, m] for i, j, k, m in itertools.permutations(range(6), 4)
    )
    found = estimates(chance, gradient)
    assert found["squared_gated"].value == pytest.approx(gated)
    assert found["squared_covariance"].value == pytest.approx(gated - 2 * cross + plain)
    assert found["squared_error"].value == pytest.approx((gated - 2 * cross + plain) / gated)
    assert found["chance"].value == pytest.approx(chance.mean())


def naive_cosine(chance, gradient):
    pairs = list(itertools.permutations(range(len(chance)), 2))
    gram = gradient @ gradient.T
    gated = np.mean([chance[i] * chance[j] * gram[i, j] for i, j in pairs])
    near = np.mean([chance[i] * gram[i, j] for i, j in pairs])
    return near / np.sqrt(gated * np.mean([gram[i, j] for i, j in pairs]))


def test_the_cosine_is_that_of_loops_corrected_by_the_jackknife():
    chance, gradient = population(np.random.default_rng(4), 12, coupling=30.0)
    without = [naive_cosine(np.delete(chance, i), np.delete(gradient, i, axis=0)) for i in range(12)]
    expected = 12 * naive_cosine(chance, gradient) - 11 * np.mean(without)
    assert expected < 1
    assert estimates(chance, gradient)["cosine"].value == pytest.approx(expected)


@pytest.mark.parametrize("coupling", [1.0, 8.0])
def test_intervals_cover_the_covariance_of_the_population(coupling):
    # E[hg] is (½, …) but for coupling·Var h in the first coordinate, Var h = 0.6²/12
    covariance = coupling * 0.03
    gated = (0.5 + covariance) ** 2 + 4 * 0.25
    truth = {
        "squared_covariance": covariance**2,
        "squared_gated": gated,
        "relative_error": covariance / np.sqrt(gated),
        "cosine": (0.5 * DIMENSIONS + covariance) / np.sqrt(gated * DIMENSIONS),
    }
    found = [estimates(*population(np.random.default_rng(seed), 60, coupling=coupling)) for seed in range(150)]
    for name, value in truth.items():
        assert np.mean([one[name].low - 1e-9 <= value <= one[name].high + 1e-9 for one in found]) >= 0.9, name
    values = np.array([one["squared_covariance"].value for one in found])
    assert abs(values.mean() - covariance**2) < 3.5 * values.std(ddof=1) / np.sqrt(150)


def test_a_gate_that_is_the_same_for_all_prompts_is_a_scalar():
    _, gradient = population(np.random.default_rng(1), 10, coupling=0.0)
    found = estimates(np.full(10, 0.3), gradient)
    assert found["relative_error"].high == pytest.approx(0, abs=1e-6)
    assert found["cosine"].value == pytest.approx(1)


def test_gates_come_from_the_groups_and_the_gradients_of_each_prompt():
    rng = np.random.default_rng(2)
    drawn = draw_rollouts(rng, Population(), prompts=12, repeats=4, group_size=4)
    traces = rng.standard_normal((12, 2, 6))
    traces[3] = np.nan
    traces[5, 1] = np.nan
    scores = to_scores(drawn, traces=traces)
    groups = make_groups(scores, SETTING)
    hard, mid = hard_gate(scores, SETTING, groups), mid_gate(make_products(scores, groups), "gal")
    kept = np.arange(12) != 3
    own = -np.nanmean(traces[kept], axis=1)
    np.testing.assert_allclose(hard.chance_P, (~drawn["correct"].any(-1)).mean(1)[kept])
    np.testing.assert_allclose(hard.product_PP, own @ own.T, rtol=1e-5, atol=1e-5)
    naive = naive_gradients(drawn, divide_by_length=False)
    passed = naive["is_mid"].any(1)
    own = naive["gal"][passed].sum(1) / naive["is_mid"][passed].sum(1)[:, None]
    np.testing.assert_allclose(mid.chance_P, naive["is_mid"][passed].mean(1))
    np.testing.assert_allclose(mid.product_PP, own @ own.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompts", [0, 1, 2])
def test_too_few_prompts_give_no_interval(prompts):
    found = estimates(*population(np.random.default_rng(3), prompts, coupling=1.0))
    assert not found["relative_error"].is_certain
