"""Laws of all objectives: what each needs, which answers are wrong, what remains a trace, and the three counts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from megatron_dypo.config.objective import ObjectiveConfig, ReferenceConfig
from megatron_dypo.objective.gal import SATURATED_AT, gal_statistics
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.objective.token_weights import group_log_ratios
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import SampleKind, Tier, Treatment, Verdict
from tests.support.graded_groups import GROUP_OF, graded
from tests.support.objective_cases import random_groups, totals_of


def built(name, **options):
    return build_objective(ObjectiveConfig(name=name, sft_steps=2, **options))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dypo", {}, True),  # GAL reads π_ref, with the default kl_coef of 0
        ("dypo", {"alpha": 0.0}, True),
        ("dypo", {"alpha": 1.0}, False),
        ("dypo", {"alpha": 1.0, "kl_coef": 0.1}, True),
        ("grpo", {}, False),
        ("grpo", {"kl_coef": 0.1}, True),
        ("grpo", {"alpha": 0.0}, False),
        ("sft", {"kl_coef": 0.1}, False),
        ("sft_then_rl", {}, False),
        ("sft_then_rl", {"kl_coef": 0.1}, True),
    ],
)
def test_a_reference_is_needed_where_gal_or_a_kl_term_reads_it(name, options, expected):
    assert built(name, **options).needs_reference() is expected


def test_an_objective_that_needs_a_reference_reads_it_and_one_that_needs_none_does_not():
    """Only an objective that needs none makes weights without reference log-probs, and the same weights with others."""
    groups = random_groups(3, num_hard=0, num_mid=2)
    other = [
        [dataclasses.replace(s, ref_logp=s.ref_logp - np.arange(len(s.ref_logp), dtype=np.float32)) for s in g]
        for g in groups
    ]
    for name, alpha, kl_coef in itertools.product(("dypo", "grpo", "sft_then_rl"), (0.5, 1.0), (0.0, 0.1)):
        objective = built(name, alpha=alpha, kl_coef=kl_coef)
        one, two = ([objective.token_weights(g, totals_of(gs), 9).weights for g in gs] for gs in (groups, other))
        reads = one != two or any(w["kl_weight"] for weights in one for w in weights)
        assert reads is objective.needs_reference()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dypo", {}, True),
        ("dypo", {"gal_coefficients": "stale"}, False),
        ("dypo", {"alpha": 1.0}, False),
        ("dypo", {"alpha": 0.0}, True),
        ("grpo", {}, False),
        ("sft", {}, False),
        ("sft_then_rl", {}, False),
    ],
)
def test_current_log_probs_are_needed_for_exact_coefficients_of_gal_alone(name, options, expected):
    assert built(name, **options).needs_current_logprobs() is expected


def test_coefficients_are_those_of_the_weights_that_scored_last():
    """Newer log-probs count, not older ones; each is the difference to the reference's, over its own divisor."""
    (group,) = random_groups(5, num_hard=0, num_mid=1)
    totals = totals_of([group])
    for mode, divisor in (("sum", 1.0), ("constant", 4.0)):
        cfg = ObjectiveConfig(length_normalization=mode, constant_length=4)
        old = [float(s.old_logp.sum(dtype="f8") - s.ref_logp.sum(dtype="f8")) / divisor for s in group]
        assert group_log_ratios(group, totals, cfg).tolist() == pytest.approx(old)
        fresh = [dataclasses.replace(s, current_logp_sum=-3.0 - i) for i, s in enumerate(group)]
        now = [(-3.0 - i - float(s.ref_logp.sum(dtype="f8"))) / divisor for i, s in enumerate(group)]
        assert group_log_ratios(fresh, totals, cfg).tolist() == pytest.approx(now)
        mixed = [fresh[0], *group[1:]]
        assert group_log_ratios(mixed, totals, cfg).tolist() == pytest.approx([now[0], *old[1:]])


def test_traces_left_over_from_the_first_phase_stay_traces():
    groups = random_groups(6, num_hard=1, num_mid=1)
    objective, sft, grpo = (built(name, gamma=0.7) for name in ("sft_then_rl", "sft", "grpo"))
    for step in (0, 1, 2, 50):
        (trace,) = objective.token_weights(groups[0], totals_of(groups), step).weights
        assert trace == sft.token_weights(groups[0], totals_of(groups), step).weights[0]
        assert trace["nll_weight"] > 0
        assert objective.token_weights(groups[1], totals_of(groups), step) == grpo.token_weights(
            groups[1], totals_of(groups), step
        )


def test_each_phase_asks_for_what_it_learns_from():
    objective = built("sft_then_rl")
    assert [objective.needs_rollouts(step) for step in range(4)] == [False, False, True, True]
    assert {objective.treat(GROUP_OF[tier], 1) for tier in (*Tier, None)} == {Treatment.DISTILL}
    assert {objective.treat(GROUP_OF[tier], 2) for tier in Tier} == {Treatment.REINFORCE}
    assert [built(name).needs_rollouts(0) for name in ("dypo", "grpo", "sft")] == [True, True, False]
    assert {built("grpo").treat(GROUP_OF[tier], 0) for tier in Tier} == {Treatment.REINFORCE}
    assert {built("sft").treat(GROUP_OF[tier], 9) for tier in (*Tier, None)} == {Treatment.DISTILL}


def shaped(order, flags, rewards):
    group = graded(order, flags)
    verdicts = tuple(Verdict(is_correct=c, reward=r) for c, r in zip(flags, rewards, strict=True))
    return dataclasses.replace(group, verdicts=verdicts)


def test_a_wrong_answer_with_a_positive_reward_is_wrong():
    """A verdict's flag says which answer is right; the shaped reward changes advantages and nothing else."""
    flags, rewards = [False, True, False], [0.9, -0.4, 0.0]
    routed = route([shaped(0, flags, rewards)], built("dypo"), step=0, version=4, seed=1)
    (group,) = routed.samples
    assert [s.is_correct for s in group] == flags
    assert [s.reward for s in group] == rewards
    for sample in group:
        sample.old_logp = sample.ref_logp = sample.rollout_logp
    weights = built("dypo").token_weights(group, totals_of([group]), 0).weights
    assert [w["nll_weight"] > 0 for w in weights] == flags
    assert [w["advantage"] > 0 for w in weights] == [True, False, False]


def test_a_hard_prompt_is_distilled_whatever_rewards_its_wrong_answers_got():
    routed = route([shaped(0, [False, False], [0.5, 0.1])], built("dypo"), step=0, version=4, seed=1)
    assert routed.treatments == [Treatment.DISTILL]


def test_the_lists_of_a_routed_round_are_parallel_to_its_groups():
    flags = [[True, True], [True, False], [False, False], [False, False]]
    groups = [graded(order, f) for order, f in enumerate(flags)]
    groups[3] = graded(3, flags[3], traces=())
    routed = route(groups, built("dypo"), step=0, version=9, seed=1)
    assert [len(samples) for samples in routed.samples] == [0, 2, 1, 0]
    assert [name is None for name in routed.teachers] == [True, True, False, True]
    assert routed.teacher_counts() == {routed.teachers[2]: 1}
    assert [s.order for samples in routed.samples for s in samples] == [1, 1, 2]
    assert routed.without_teacher == 1


def test_prompts_sequences_and_tokens_are_three_counts():
    groups = random_groups(7, num_hard=3, num_mid=2, group_size=4)
    counts = count_groups(groups)
    assert counts.prompts == 5
    assert counts.sequences == {SampleKind.TRACE: 3, SampleKind.ROLLOUT: 8}
    assert counts.response_tokens[SampleKind.ROLLOUT] == sum(s.num_response_tokens for g in groups[3:] for s in g)
    parts = [groups[:1], groups[1:4], groups[4:], []]
    assert add_counts(count_groups(part) for part in parts) == totals_of(groups)
    assert add_counts([count_groups([])]).num_prompts == 0


@pytest.mark.parametrize("mode", ["sum", "sequence_mean", "token_mean", "constant"])
def test_each_count_enters_the_weights_where_the_mode_says(mode):
    """Twice the prompts halve every weight. Twice the sequences or half the tokens halve only token_mean's divisor."""
    groups = random_groups(8, num_hard=1, num_mid=1)
    totals = totals_of(groups)
    more = {
        "prompts": dataclasses.replace(totals, num_prompts=2 * totals.num_prompts),
        "sequences": dataclasses.replace(totals, num_sequences={k: 2 * v for k, v in totals.num_sequences.items()}),
        "tokens": dataclasses.replace(
            totals, num_response_tokens={k: 2 * v for k, v in totals.num_response_tokens.items()}
        ),
    }
    factor = {"prompts": 0.5, "sequences": 1.0, "tokens": 1.0}
    if mode == "token_mean":
        factor |= {"sequences": 2.0, "tokens": 0.5}
    objective = built("dypo", length_normalization=mode, alpha=1.0, kl_coef=0.5)
    for group in groups:
        plain = objective.token_weights(group, totals, 0).weights[0]
        for count, changed in more.items():
            weights = objective.token_weights(group, changed, 0).weights[0]
            names = weights.keys() - {"advantage"}
            assert {n: weights[n] for n in names} == pytest.approx({n: factor[count] * plain[n] for n in names})


def test_diagnostics_of_gal_are_means_over_the_pairs():
    rng = np.random.default_rng(1)
    for beta, spread in ((0.7, 1.0), (2.0, 5.0), (1.0, 20.0)):
        ratio, success = rng.normal(0, spread, 7), rng.permutation([1, 1, 1, 0, 0, 0, 0]).astype(bool)
        margins = [s - f for s in ratio[success] for f in ratio[~success]]
        weights = [1 / (1 + math.exp(beta * d)) for d in margins]
        statistics = gal_statistics(torch.tensor(ratio), torch.tensor(success), beta)
        assert statistics.loss == pytest.approx(np.mean([math.log1p(math.exp(-beta * d)) for d in margins]))
        assert statistics.eta == pytest.approx(np.mean([w * w for w in weights]))
        assert statistics.saturation == pytest.approx(np.mean([abs(beta * d) > SATURATED_AT for d in margins]))
        assert statistics.margin == pytest.approx(np.mean(margins))
    assert 0 < statistics.saturation < 1


def test_a_reference_keeps_weights_and_is_refreshed_as_its_mode_says():
    steps = range(1, 7)
    modes = {mode: ReferenceConfig(mode=mode, refresh_every=3) for mode in ("frozen", "refreshed", "old")}
    assert [modes[mode].keeps_weights() for mode in modes] == [True, True, False]
    assert [modes["refreshed"].is_refreshed_after(step) for step in steps] == [False, False, True, False, False, True]
    assert not any(modes[mode].is_refreshed_after(step) for mode in ("frozen", "old") for step in steps)
