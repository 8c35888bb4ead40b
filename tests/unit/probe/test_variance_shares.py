"""Shares of the variance by prompts, length and rollouts, against loops over pairs and a population that is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megatron_dypo.probe.gradients import Setting, make_groups
from megatron_dypo.probe.shares import estimate_shares
from tests.support.probe_cases import Population, draw_rollouts, to_scores

SETTING = Setting(group_size=4, length_normalization="sum", normalize_std=False)


def draw(seed, *, prompts=25, repeats=4, by_length=0.0, **parts):
    """Draw rollouts; ``by_length`` moves the last coordinate of a score with the length and the correctness."""
    drawn = draw_rollouts(
        np.random.default_rng(seed), Population(**parts), prompts=prompts, repeats=repeats, group_size=4
    )
    centred = drawn["length"] - drawn["length"].mean()
    drawn["score"][..., -1] += by_length * centred * np.where(drawn["correct"], 1, -1)
    return drawn


def estimates(drawn) -> Any:
    scores = to_scores(drawn)
    return estimate_shares(scores, make_groups(scores, SETTING))


def test_shares_add_up_to_one():
    found = estimates(draw(0, by_length=0.2))
    for term in ("grpo", "gal"):
        assert sum(found[term][part].value for part in ("prompts", "length", "rollouts")) == pytest.approx(1)


def test_shares_equal_loops_over_pairs_of_different_groups():
    drawn = draw(1, prompts=6, repeats=4, by_length=0.3)
    pairs: list[Any]
    correct = drawn["correct"]
    is_mid = correct.any(-1) & ~correct.all(-1)
    kept = [q for q in range(6) if is_mid[q].sum() >= 2]
    square, quartile, prompt, mean, weight = [], [], [], [], []
    for q in kept:
        groups = np.flatnonzero(is_mid[q])
        advantage = correct[q, groups] - correct[q, groups].mean(-1, keepdims=True)
        value = -advantage[..., None] * drawn["score"][q, groups]
        length = drawn["length"][q, groups]
        part = np.searchsorted(np.quantile(length, [0.25, 0.5, 0.75]), length)
        pairs = [p for p in itertools.permutations(np.ndindex(length.shape), 2) if p[0][0] != p[1][0]]
        products = {p: value[p[0]] @ value[p[1]] for p in pairs}
        alike = {
            n: ([products[p] for p in pairs if part[p[0]] == part[p[1]] == n], (part == n).sum()) for n in range(4)
        }
        counted = [(np.mean(found), size) for found, size in alike.values() if found]
        square.append((value**2).sum(-1).mean())
        quartile.append(np.average([one for one, _ in counted], weights=[size for _, size in counted]))
        prompt.append(np.mean(list(products.values())))
        mean.append(value.mean((0, 1)))
        weight.append(len(groups))
    pairs = list(itertools.permutations(range(len(kept)), 2))
    apart = np.average([mean[a] @ mean[b] for a, b in pairs], weights=[weight[a] * weight[b] for a, b in pairs])
    first, second, third = (np.average(figures, weights=weight) for figures in (square, quartile, prompt))
    found = estimates(drawn)["grpo"]
    assert found["prompts"].value == pytest.approx((third - apart) / (first - apart), rel=1e-4, abs=1e-6)
    assert found["length"].value == pytest.approx((second - third) / (first - apart), rel=1e-4, abs=1e-6)
    assert found["rollouts"].value == pytest.approx((first - second) / (first - apart), rel=1e-4, abs=1e-6)
    assert found["prompts_with_two_mid"] == len(kept)


def test_without_effects_of_prompt_or_length_all_is_by_rollouts():
    found = [estimates(draw(seed, prompt_sd=0.0, low=0.5, high=0.5))["grpo"] for seed in range(40)]
    for part, truth in (("prompts", 0.0), ("length", 0.0), ("rollouts", 1.0)):
        assert np.mean([one[part].low <= truth <= one[part].high for one in found]) >= 0.9, part


def test_an_effect_of_length_has_a_share():
    found = estimates(draw(2, prompts=60, by_length=1.0))
    assert found["grpo"]["length"].low > 0.2
    assert estimates(draw(2, prompts=60))["grpo"]["length"].high < 0.1


def test_different_prompts_have_a_share():
    assert estimates(draw(3, prompts=60, prompt_sd=2.0))["gal"]["prompts"].low > 0.1
