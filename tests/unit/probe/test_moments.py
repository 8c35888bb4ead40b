"""Moments of GRPO, GAL and the mix against a large population and brute force; coverage of their intervals."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_dypo.probe.gradients import Setting, make_groups
from megatron_dypo.probe.mixing import GRID, estimate_moments
from megatron_dypo.probe.moments import compute_moments, make_products, of_mix
from tests.support.present import present
from tests.support.probe_cases import (
    Population,
    draw_rollouts,
    mixed,
    naive_gradients,
    take,
    to_scores,
    weighted_moments,
)

POPULATION = Population(lean=2.0, noise_sd=1.0, signal=2.0)
SUM = Setting(group_size=4, length_normalization="sum")
ALPHA = 0.5
NAMES = {"grpo": "grpo", "gal": "gal", "both": "covariance"}


def draw(seed, *, prompts=30, repeats=4):
    return draw_rollouts(np.random.default_rng(seed), POPULATION, prompts=prompts, repeats=repeats, group_size=4)


def products_of(drawn):
    scores = to_scores(drawn)
    return make_products(scores, make_groups(scores, SUM))


@functools.cache
def truth(given_mid: bool) -> dict[str, Any]:
    """Return the moments of 25,000 prompts, and everything that follows from them."""
    parts: Any = weighted_moments(
        naive_gradients(draw(99, prompts=25_000), divide_by_length=False), given_mid=given_mid
    )
    total, mean = parts["total"], parts["squared_mean"]
    fine = np.linspace(0, 1, 1001)
    best = min(
        max((total["gal"] - total["covariance"]) / (total["grpo"] + total["gal"] - 2 * total["covariance"]), 0), 1
    )
    without = total["gal"] / (total["grpo"] + total["gal"])
    return {
        **parts,
        "ratios": {
            "gal_to_grpo": total["gal"] / total["grpo"],
            "mix_to_grpo": mixed(total, ALPHA) / total["grpo"],
            "signal_gal_to_grpo": mean["gal"] / total["gal"] / (mean["grpo"] / total["grpo"]),
            "signal_mix_to_grpo": mixed(mean, ALPHA) / mixed(total, ALPHA) / (mean["grpo"] / total["grpo"]),
            "correlation": total["covariance"] / np.sqrt(total["grpo"] * total["gal"]),
        },
        "mix": {
            "variance": mixed(total, ALPHA),
            "best_alpha": best,
            "variance_at_best": mixed(total, best),
            "best_alpha_without_covariance": without,
            "variance_at_best_without_covariance": mixed(total, without),
            "variance_claimed_without_covariance": mixed({**total, "covariance": 0.0}, without),
        },
        "signal_to_noise": {
            "grpo": mean["grpo"] / total["grpo"],
            "gal": mean["gal"] / total["gal"],
            "mix": mixed(mean, ALPHA) / mixed(total, ALPHA),
            "best_alpha": fine[np.argmax([mixed(mean, a) / mixed(total, a) for a in fine])],
        },
    }


@functools.cache
def sampled_products():
    return [products_of(draw(1000 + seed)) for seed in range(150)]


@functools.cache
def trials(scope) -> list[Any]:
    return [estimate_moments(products, ALPHA, scope) for products in sampled_products()]


@pytest.mark.parametrize("scope", ["all", "mid"])
def test_intervals_contain_the_population_in_at_least_nine_trials_of_ten(scope):
    expected, held = truth(scope == "mid"), defaultdict(list)
    for found in trials(scope):
        for part, values in expected.items():
            for name, value in values.items():
                one = found[part][name]
                held[part, name].append(one.low - 1e-12 <= value <= one.high + 1e-12)
    assert len(held) == 27
    shares = {key: np.mean(hits) for key, hits in held.items()}
    assert {key: share for key, share in shares.items() if share < 0.9} == {}


INTERIOR = Population(lean=1.4, noise_sd=1.0, signal=2.0)
STEEP = Setting(group_size=4, length_normalization="sum", beta_gal=2.0)
"""GAL's weights vary so much with β = 2 that neither gradient alone has the least variance."""


def draw_interior(seed, prompts):
    return draw_rollouts(np.random.default_rng(seed), INTERIOR, prompts=prompts, repeats=4, group_size=4)


def least_variance_by_brute_force(given_mid):
    """Return the α of the least variance of the mixed gradients of 25,000 prompts, with and without the covariance.

    Without it, the variance is taken to be α²·Var(GRPO) + (1 − α)²·Var(GAL).
    """
    found = naive_gradients(draw_interior(99, 25_000), divide_by_length=False, beta=2.0)
    kept = found["is_mid"] if given_mid else np.ones_like(found["is_mid"])
    grpo, gal = found["grpo"][kept], found["gal"][kept]
    alphas = np.linspace(0, 1, 201)
    variances = [float(np.var(alpha * grpo + (1 - alpha) * gal, axis=0).sum()) for alpha in alphas]
    apart = alphas**2 * variances[-1] + (1 - alphas) ** 2 * variances[0]
    return float(alphas[np.argmin(variances)]), float(alphas[np.argmin(apart)])


@pytest.mark.parametrize("scope", ["all", "mid"])
def test_intervals_contain_a_best_alpha_between_the_two_terms(scope):
    best, without = least_variance_by_brute_force(scope == "mid")
    assert 0.3 < without < best - 0.1
    assert best < 0.7
    scores = [to_scores(draw_interior(1000 + seed, 60)) for seed in range(50)]
    found: Any = [estimate_moments(make_products(one, make_groups(one, STEEP)), ALPHA, scope)["mix"] for one in scores]

    def contain(name, value):
        return np.mean([one[name].low <= value <= one[name].high for one in found])

    for name, truth, wrong in (("best_alpha", best, 0.25), ("best_alpha_without_covariance", without, best)):
        assert contain(name, truth) >= 0.9
        assert contain(name, wrong) < 0.5
        assert all(0 < one[name].high - one[name].low < 1 for one in found)


@pytest.mark.parametrize("scope", ["all", "mid"])
def test_estimates_of_moments_are_unbiased(scope):
    expected = truth(scope == "mid")
    for part in ("total", "within_prompts", "between_prompts", "squared_mean"):
        for name, value in expected[part].items():
            found = np.array([trial[part][name].value for trial in trials(scope)])
            assert abs(found.mean() - value) < 3.5 * found.std(ddof=1) / np.sqrt(len(found)), (part, name)


def brute_force(drawn, given_mid):
    """Return total, within, mean products by loops over pairs of prompts and groups."""
    found = naive_gradients(drawn, divide_by_length=False)
    is_mid = found["is_mid"]
    prompts, repeats = is_mid.shape
    result: dict[str, Any] = {"total": {}, "within": {}, "mean": {}}
    for pair, (a, b) in {"grpo": ("grpo", "grpo"), "gal": ("gal", "gal"), "both": ("grpo", "gal")}.items():
        products = chances = squares = counted = within = paired = 0.0
        for q in range(prompts):
            counts = [r for r in range(repeats) if is_mid[q, r] or not given_mid]
            squares += sum(found[a][q, r] @ found[b][q, r] for r in counts) / repeats
            counted += len(counts) / repeats
            if len(counts) >= 2:
                own = np.cov(found[a][q, counts].T, found[b][q, counts].T)
                within += len(counts) * np.trace(own[: len(own) // 2, len(own) // 2 :])
                paired += len(counts)
            for other in set(range(prompts)) - {q}:
                products += found[a][q].sum(0) @ found[b][other].sum(0) / repeats**2
                chances += len(counts) * (is_mid[other].sum() if given_mid else repeats) / repeats**2
        result["mean"][pair] = products / chances
        result["total"][pair] = squares / counted - products / chances
        result["within"][pair] = within / paired
    return result


@pytest.mark.parametrize("scope", ["all", "mid"])
def test_moments_equal_loops_over_pairs_of_prompts_with_and_without_a_prompt(scope):
    drawn = draw(5, prompts=9)
    weights = np.ones((2, 9))
    weights[1, 4] = 0
    found = compute_moments(products_of(drawn), weights, scope)
    without = {name: np.delete(array, 4, axis=0) for name, array in drawn.items()}
    for row, data in enumerate((drawn, without)):
        expected = brute_force(data, scope == "mid")
        for pair in NAMES:
            assert found.total_B[pair][row] == pytest.approx(expected["total"][pair], rel=1e-5, abs=1e-5)
            assert found.within_B[pair][row] == pytest.approx(expected["within"][pair], rel=1e-5, abs=1e-5)
            assert found.mean_B[pair][row] == pytest.approx(expected["mean"][pair], rel=1e-5, abs=1e-5)
            assert found.between_B[pair][row] + found.within_B[pair][row] == pytest.approx(found.total_B[pair][row])


def test_the_variance_of_the_mix_is_that_of_mixed_gradients():
    drawn = draw(6, prompts=12)
    found: Any = estimate_moments(products_of(drawn), 0.3, "all")
    naive = naive_gradients(drawn, divide_by_length=False)
    for alpha, variance in [
        (0.3, found["mix"]["variance"]),
        *((one["alpha"], one["variance"]) for one in found["mix"]["grid"]),
    ]:
        mixture = (alpha * naive["grpo"] + (1 - alpha) * naive["gal"]).reshape(12, 4, -1)
        own = mixture.mean(1)
        different = (own.sum(0) @ own.sum(0) - (own**2).sum()) / (12 * 11)
        assert variance.value == pytest.approx((mixture**2).sum(-1).mean() - different, rel=1e-5)
    assert len(found["mix"]["grid"]) == len(GRID)


def test_no_alpha_of_the_grid_has_a_smaller_variance_than_the_best():
    found: Any = estimate_moments(products_of(draw(7)), ALPHA, "mid")
    least = present(found["mix"]["variance_at_best"].value)
    assert least <= min(one["variance"].value for one in found["mix"]["grid"]) + 1e-12
    assert least <= found["mix"]["variance_at_best_without_covariance"].value


@pytest.mark.parametrize("scope", ["all", "mid"])
def test_scaled_scores_scale_variances_by_the_square_and_leave_quotients(scope):
    scores = to_scores(draw(8))
    larger = replace(scores, score_Nd=scores.score_Nd * np.float32(4))
    first, second = (
        estimate_moments(make_products(one, make_groups(one, SUM)), ALPHA, scope) for one in (scores, larger)
    )
    one: Any
    other: Any
    one, other = first, second
    for part in ("total", "within_prompts", "squared_mean"):
        assert other[part]["gal"].value == pytest.approx(16 * one[part]["gal"].value)
        assert other[part]["gal"].high == pytest.approx(16 * one[part]["gal"].high)
    for part, name in (("ratios", "gal_to_grpo"), ("mix", "best_alpha"), ("signal_to_noise", "mix")):
        assert other[part][name].value == pytest.approx(one[part][name].value)
    assert other["cosine_of_means"].value == pytest.approx(one["cosine_of_means"].value)


def test_the_order_of_trajectories_and_prompts_does_not_matter():
    scores = to_scores(draw(9))
    shuffled = take(scores, np.random.default_rng(0).permutation(len(scores.prompt_N)))
    renamed = replace(shuffled, prompt_N=len(scores.prompt_ids) - 1 - shuffled.prompt_N)
    one: Any
    other: Any
    one, other = (estimate_moments(make_products(s, make_groups(s, SUM)), ALPHA, "mid") for s in (scores, renamed))
    for name in NAMES.values():
        for end in ("value", "low", "high"):
            assert getattr(one["total"][name], end) == pytest.approx(getattr(other["total"][name], end), rel=1e-9)


def test_without_a_mid_group_there_is_no_interval():
    drawn = {**draw(10, prompts=5), "correct": np.zeros((5, 4, 4), dtype=bool)}
    everywhere: Any = estimate_moments(products_of(drawn), ALPHA, "all")
    given_mid: Any = estimate_moments(products_of(drawn), ALPHA, "mid")
    assert everywhere["total"]["grpo"].value == 0
    assert not everywhere["total"]["grpo"].is_certain
    assert given_mid["total"]["grpo"].value is None
    assert given_mid["signal_to_noise"]["best_alpha"].value is None


def test_a_mix_of_one_term_is_that_term():
    parts = {"grpo": np.array([2.0]), "gal": np.array([3.0]), "both": np.array([-1.0])}
    assert of_mix(parts, 1.0) == [2.0]
    assert of_mix(parts, 0.0) == [3.0]
    assert of_mix(parts, 0.5) == [0.75]
