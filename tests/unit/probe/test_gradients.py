"""Gradients of one prompt from scores, against the token weights of the trainer and a naive computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.token_weights import gal_weights, grpo_weights, sft_weights
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.probe.gradients import Setting, make_groups, prompt_gradients, sft_gradients
from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.probe_cases import Population, draw_rollouts, gradients, naive_gradients, take, to_scores

NORMALIZATIONS = ("sum", "sequence_mean", "token_mean", "group_mean", "constant")


def example(seed=0, *, prompts=6, repeats=4, group_size=4):
    rng = np.random.default_rng(seed)
    drawn = draw_rollouts(rng, Population(), prompts=prompts, repeats=repeats, group_size=group_size)
    scores = to_scores(drawn, traces=rng.standard_normal((prompts, 2, 6)))
    shaped = scores.reward_N - 0.1 * rng.random(len(scores.reward_N))  # advantages read rewards, the gate flags
    return drawn, replace(scores, reward_N=shaped, length_N=scores.length_N + (scores.teacher_N == 1))


def sample_of(scores, index, *, reference, order):
    length = int(scores.length_N[index])
    return Sample(
        order=order,
        member=0,
        treatment=Treatment.REINFORCE,
        kind=SampleKind.ROLLOUT if scores.teacher_N[index] < 0 else SampleKind.TRACE,
        tokens=np.zeros(length + 2, np.int32),
        num_prompt_tokens=2,
        policy_version=0,
        is_correct=bool(scores.is_correct_N[index]),
        reward=float(scores.reward_N[index]),
        old_logp=np.zeros(length, np.float32),
        ref_logp=np.zeros(length, np.float32),
        current_logp_sum=float(scores.log_ratio_N[reference][index]),
    )


@pytest.mark.parametrize("reference", ["old", "frozen"])
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("length_normalization", NORMALIZATIONS)
def test_the_weights_of_the_scores_are_the_trainers_token_weights(length_normalization, normalize_std, reference):
    _, scores = example()
    shared = {
        "length_normalization": length_normalization,
        "normalize_std": normalize_std,
        "constant_length": 11,
        "beta_gal": 0.7,
        "advantage_epsilon": 1e-3,
    }
    setting, cfg = Setting(group_size=4, reference=reference, **shared), ObjectiveConfig(**shared)
    groups = make_groups(scores, setting)
    mid = [tuple(at) for at in np.argwhere(groups.is_mid_PR)]
    assert len(mid) > 10
    samples = [
        [sample_of(scores, i, reference=reference, order=n) for i in groups.index_PRk[at]] for n, at in enumerate(mid)
    ]
    totals = add_counts([count_groups(samples)])
    for at, group in zip(mid, samples, strict=True):
        grpo: Any = grpo_weights(group, totals, cfg, scale=totals.num_prompts, step=0)
        gal: Any = gal_weights(group, totals, cfg, scale=totals.num_prompts)[0]
        # the loss is −Σ pg_weight·Â·ρ + Σ nll_weight·(−log π), so these are its derivatives by Σ_t log π
        np.testing.assert_allclose(groups.grpo_PRk[at], [-w["pg_weight"] * w["advantage"] for w in grpo], rtol=1e-12)
        np.testing.assert_allclose(groups.gal_PRk[at], [-w["nll_weight"] for w in gal], rtol=1e-12)


@pytest.mark.parametrize("length_normalization", NORMALIZATIONS)
def test_the_gradient_of_a_trace_is_the_trainers(length_normalization):
    _, scores = example()
    shared = {"length_normalization": length_normalization, "constant_length": 11}
    found_PMd, has_PM = sft_gradients(scores, Setting(group_size=4, **shared))
    traces = [sample_of(scores, i, reference="old", order=i) for i in np.flatnonzero(scores.teacher_N >= 0)]
    totals = add_counts([count_groups([trace] for trace in traces)])
    assert has_PM.all()
    for index, trace in zip(np.flatnonzero(scores.teacher_N >= 0), traces, strict=True):
        weights: Any = sft_weights(trace, totals, ObjectiveConfig(**shared), scale=totals.num_prompts)
        expected = -weights["nll_weight"] * scores.score_Nd[index].astype(np.float64)
        np.testing.assert_allclose(found_PMd[scores.prompt_N[index], scores.teacher_N[index]], expected, rtol=1e-12)


@pytest.mark.parametrize("divide_by_length", [True, False])
def test_gradients_equal_a_naive_sum_over_pairs_and_members(divide_by_length):
    drawn = draw_rollouts(np.random.default_rng(3), Population(), prompts=5, repeats=3, group_size=5)
    expected = naive_gradients(drawn, divide_by_length=divide_by_length)
    name: Any = "sequence_mean" if divide_by_length else "sum"
    found = gradients(to_scores(drawn), Setting(group_size=5, length_normalization=name))
    np.testing.assert_allclose(found.grpo_PRd, expected["grpo"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.gal_PRd, expected["gal"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.is_mid_PR, expected["is_mid"])
    np.testing.assert_array_equal(found.is_hard_PR, ~drawn["correct"].any(-1))
    assert found.is_group_PR.all()


def test_groups_of_another_size_are_made_of_the_same_rollouts_in_order():
    drawn, scores = example(repeats=3, group_size=4)
    groups = make_groups(scores, Setting(group_size=5))
    assert groups.index_PRk.shape == (6, 2, 5)  # 12 rollouts: two groups of 5, two left over
    for prompt in range(6):
        np.testing.assert_array_equal(groups.index_PRk[prompt].ravel(), 12 * prompt + np.arange(10))
    flat = {
        name: array.reshape(6, 12, *array.shape[3:])[:, :10].reshape(6, 2, 5, *array.shape[3:])
        for name, array in drawn.items()
    }
    found = gradients(replace(scores, reward_N=scores.is_correct_N.astype(np.float64)), Setting(group_size=5))
    np.testing.assert_allclose(found.gal_PRd, naive_gradients(flat)["gal"], rtol=1e-5, atol=1e-6)


def test_groups_that_are_not_mid_have_zero_vectors():
    _, scores = example(1)
    found = gradients(scores, Setting(group_size=4))
    assert not found.is_mid_PR.all()
    assert not found.grpo_PRd[~found.is_mid_PR].any()
    assert not found.gal_PRd[~found.is_mid_PR].any()


def test_the_order_of_trajectories_does_not_matter():
    _, scores = example(2)
    setting = Setting(group_size=4)
    shuffled = take(scores, np.random.default_rng(0).permutation(len(scores.prompt_N)))
    for one, other in zip(
        prompt_gradients(scores, make_groups(scores, setting)),
        prompt_gradients(shuffled, make_groups(shuffled, setting)),
        strict=True,
    ):
        np.testing.assert_allclose(one.grpo_Rd, other.grpo_Rd, atol=1e-12)
        np.testing.assert_allclose(one.gal_Rd, other.gal_Rd, atol=1e-12)
    np.testing.assert_array_equal(sft_gradients(scores, setting)[0], sft_gradients(shuffled, setting)[0])


def test_prompts_may_have_different_numbers_of_rollouts_or_none():
    _, scores = example(4, prompts=3)
    kept = (scores.prompt_N == 0) | ((scores.prompt_N == 1) & (scores.repeat_N < 2) & (scores.repeat_N >= 0))
    groups = make_groups(take(scores, np.flatnonzero(kept)), Setting(group_size=4))
    assert groups.is_group_PR.sum(axis=1).tolist() == [4, 2, 0]
    assert not groups.is_mid_PR[~groups.is_group_PR].any()
    assert not groups.is_hard_PR[~groups.is_group_PR].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 1}, "group_size=1: must be at least 2"),
        ({"length_normalization": "mean"}, "length_normalization=mean: must be one of sum, "),
        ({"beta_gal": 0.0}, "beta_gal=0.0: must be positive"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Setting(**{"group_size": 4, **change})


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="reference=refreshed: must be one of old, frozen"):
        make_groups(example()[1], Setting(group_size=4, reference="refreshed"))
