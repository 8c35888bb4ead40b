"""Weights of whole batches: each objective's treatment of each tier, and the sums of its weights."""

import dataclasses

import numpy as np
import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.types import Tier, Treatment
from tests.support.graded_groups import GROUP_OF
from tests.support.objective_cases import random_groups, totals_of

MODES = ("sum", "sequence_mean", "token_mean", "constant")


def objective(name="dypo", **options):
    return build_objective(ObjectiveConfig(name=name, sft_steps=3, **options))


def weigh_all(name, groups, **options):
    built = objective(name, **options)
    return [built.token_weights(group, totals_of(groups), 0) for group in groups]


def test_dypo_drops_easy_distills_hard_and_reinforces_mid():
    treat = objective().treat
    assert [treat(GROUP_OF[t], 0) for t in (Tier.EASY, Tier.MID, Tier.HARD)] == [
        Treatment.DROP,
        Treatment.REINFORCE,
        Treatment.DISTILL,
    ]


def test_before_the_switch_every_prompt_goes_to_rl():
    dypo = objective(rl_only_steps=5)
    assert {dypo.treat(GROUP_OF[tier], 4) for tier in Tier} == {Treatment.REINFORCE}
    assert dypo.treat(GROUP_OF[Tier.EASY], 5) is Treatment.DROP


def test_sft_asks_no_server_and_sft_then_rl_changes_at_its_step():
    assert not objective("sft").needs_rollouts(0)
    both = objective("sft_then_rl")
    assert [both.needs_rollouts(step) for step in (0, 2, 3)] == [False, False, True]
    assert both.treat(GROUP_OF[None], 2) is Treatment.DISTILL
    assert both.treat(GROUP_OF[Tier.HARD], 3) is Treatment.REINFORCE


@pytest.mark.parametrize("mode", MODES)
def test_gal_weights_of_a_group_sum_to_zero_over_scaled_trajectories(mode):
    groups = random_groups(2)
    for group, result in zip(groups, weigh_all("dypo", groups, length_normalization=mode, alpha=0.0), strict=True):
        if group[0].treatment is Treatment.DISTILL:
            continue
        divisors = [
            {
                "sum": 1,
                "sequence_mean": s.num_response_tokens,
                "token_mean": totals_of(groups).num_response_tokens[s.kind] / totals_of(groups).num_sequences[s.kind],
                "constant": 8192,
            }[mode]
            for s in group
        ]
        assert sum(w["nll_weight"] * d for w, d in zip(result.weights, divisors, strict=True)) == pytest.approx(
            0, abs=1e-15
        )
        for sample, weights in zip(group, result.weights, strict=True):
            assert weights["nll_weight"] >= 0 if sample.is_correct else weights["nll_weight"] <= 0


@pytest.mark.parametrize("mode", MODES)
def test_all_three_terms_get_the_same_divisor(mode):
    """A trace and a rollout of the same length differ only by their scales."""
    groups = random_groups(4, num_hard=1, num_mid=1, group_size=2)
    for group in groups:
        for sample in group:
            sample.tokens, sample.num_prompt_tokens = np.zeros(9, np.int32), 4
    (hard,), mid = (r.weights for r in weigh_all("dypo", groups, length_normalization=mode, alpha=0.25, gamma=2.0))
    per_prompt = hard["nll_weight"] / 2.0
    assert mid[0]["pg_weight"] == pytest.approx(0.25 * per_prompt / 2)


def test_tiers_keep_the_shares_of_the_mean_over_prompts():
    groups = random_groups(6, num_hard=3, num_mid=1, group_size=4)
    results = weigh_all("dypo", groups, length_normalization="sequence_mean", alpha=1.0)
    sft = sum(
        r.weights[0]["nll_weight"] * g[0].num_response_tokens for g, r in zip(groups[:3], results[:3], strict=True)
    )
    rl = sum(w["pg_weight"] * s.num_response_tokens for s, w in zip(groups[3], results[3].weights, strict=True))
    assert (sft, rl) == (pytest.approx(3 / 4), pytest.approx(1 / 4))


def test_grpo_gives_no_gradient_to_groups_with_equal_rewards():
    group = [dataclasses.replace(s, reward=1.0) for s in random_groups(1, num_hard=0, num_mid=1)[0]]
    (result,) = weigh_all("grpo", [group])
    assert all(w["advantage"] == 0 and "nll_weight" not in w for w in result.weights)


def test_gals_share_of_the_loss_is_reported_with_its_weight():
    groups = random_groups(8)
    results = weigh_all("dypo", groups, alpha=0.25)
    for result in results:
        expected = 0.75 * result.sums["gal_loss"] / len(groups) if result.sums else 0.0
        assert result.sums.get("objective", 0.0) == pytest.approx(expected)
    assert sum(r.sums.get("gal_groups", 0) for r in results) == 3


def test_log_probs_of_the_updates_own_weights_replace_the_old_ones():
    groups = random_groups(9, num_hard=0, num_mid=1)
    fresh = [[dataclasses.replace(s, current_logp_sum=float(s.ref_logp.sum())) for s in groups[0]]]
    (stale,), (exact,) = weigh_all("dypo", groups), weigh_all("dypo", fresh)
    assert exact.sums["gal_eta"] == pytest.approx(0.25)
    assert stale.sums["gal_eta"] != pytest.approx(0.25)


def test_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match=r"objective\.name='dpo': must be one of dypo, grpo, sft, sft_then_rl"):
        build_objective(ObjectiveConfig(name="dpo"))
    with pytest.raises(ValueError, match=r"objective\.sft_steps=0"):
        build_objective(ObjectiveConfig(name="sft_then_rl"))
    assert set(OBJECTIVES) >= {"dypo", "grpo", "sft", "sft_then_rl"}
