"""Values of a step's metrics: each is its own numerator over its own denominator. All numbers are different."""

import numpy as np
import pytest
import torch

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.loop.books.step_metrics import rollout_metrics, update_metrics
from megatron_dypo.loop.books.tally import Tally, tally_logprob_error, tally_sums, tally_update
from megatron_dypo.objective.gal import GalStatistics, gal_sums
from megatron_dypo.objective.loss import sum_names
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.types import SampleKind, Totals
from tests.support.objective_cases import random_groups
from tests.support.present import present

TOTALS = Totals(
    num_prompts=5,
    num_sequences={SampleKind.TRACE: 2, SampleKind.ROLLOUT: 11},
    num_response_tokens={SampleKind.TRACE: 70, SampleKind.ROLLOUT: 230},
)
DYPO = build_objective(ObjectiveConfig())
SUMS = {name: 1.0 + 0.1 * i for i, name in enumerate(sum_names(DYPO.loss, DYPO.streams))} | {
    "tokens": 300.0,
    "trace_tokens": 70.0,
    "rollout_tokens": 230.0,
    "rollouts": 11.0,
}


def metrics_of(tally):
    return update_metrics(tally, TOTALS, SUMS, DYPO.metrics)


def test_the_loss_is_the_sum_of_all_terms_with_gals():
    tally = Tally()
    tally_sums(tally, {"objective": 0.3})
    tally_sums(tally, {"objective": 0.4})
    assert metrics_of(tally)["train/loss"] == pytest.approx(SUMS["objective"] + 0.7)


def test_offline_shares_are_of_prompts_of_sequences_and_of_tokens():
    metrics = metrics_of(Tally())
    assert metrics["gate/offline_share_prompts"] == pytest.approx(2 / 5)  # a trace is a prompt
    assert metrics["gate/offline_share_sequences"] == pytest.approx(2 / 13)
    assert metrics["gate/offline_share_tokens"] == pytest.approx(70 / 300)
    assert metrics["train/num_prompts"] == 5


@pytest.mark.parametrize(
    ("metric", "numerator", "denominator"),
    [
        ("train/entropy", "entropy", "rollout_tokens"),
        ("train/pg_clipfrac", "clipped", "rollout_tokens"),
        ("train/ppo_kl", "ppo_kl", "rollout_tokens"),
        ("train/importance_capped_ratio", "importance_capped", "rollout_tokens"),
        ("train/importance_masked_ratio", "importance_masked", "rollout_tokens"),
        ("train/importance_masked_rollouts_ratio", "rollouts_masked", "rollouts"),
        ("gal/drift", "gal_drift", "gal_sequences"),
        ("gal/clipfrac", "gal_clipped", "gal_tokens"),
    ],
)
def test_each_ratio_has_its_own_denominator(metric, numerator, denominator):
    assert metrics_of(Tally())[metric] == pytest.approx(SUMS[numerator] / SUMS[denominator])


def test_terms_of_the_loss_are_reported_as_they_are_and_the_nll_by_tokens_of_traces():
    metrics = metrics_of(Tally())
    assert metrics["train/pg_loss"] == SUMS["pg"]
    assert metrics["train/kl_loss"] == SUMS["kl"]
    assert metrics["train/sft_loss"] == SUMS["sft"]
    assert metrics["train/sft_nll"] == pytest.approx(SUMS["trace_nll"] / 70)


def test_gals_diagnostics_are_means_over_groups_and_its_log_ratio_over_members():
    tally = Tally()
    for scale, members in ((1.0, 4), (3.0, 7)):
        statistics = GalStatistics(loss=0.5 * scale, eta=0.2 * scale, saturation=0.1 * scale, margin=-1.5 * scale)
        log_ratio_G = torch.full((members,), -2.0 * scale / members, dtype=torch.float64)
        tally_sums(tally, gal_sums(statistics, log_ratio_G))
    metrics = metrics_of(tally)
    expected = {"loss": 1.0, "eta": 0.4, "saturation": 0.2, "margin": -3.0, "log_ratio": -8.0 / 11}
    assert {name: metrics[f"gal/{name}"] for name in expected} == pytest.approx(expected)


def test_a_sequences_error_is_that_of_its_sum_where_errors_of_both_signs_cancel():
    tally = Tally()
    for error in ([0.5, -0.25, -0.5], [-1.0], [0.75, -0.75]):
        tally_logprob_error(tally, np.array(error, np.float32))
    tally.add("rollouts")
    metrics, name = rollout_metrics(tally), "old_logp/server_error/"
    assert metrics[name + "sequence"] == pytest.approx((0.25 + 1.0 + 0.0) / 3)
    assert metrics[name + "mean"] == pytest.approx((1.25 + 1.0 + 1.5) / 6)
    assert metrics[name + "max"] == 1.0


def test_an_update_counts_all_its_tokens_the_response_and_the_age_of_each_sequence():
    tally, samples = Tally(), [s for g in random_groups(3, num_hard=1, num_mid=2) for s in g]
    for age, sample in enumerate(samples):
        sample.policy_version = 20 - age
        if sample.old_logp is not None:
            sample.rollout_logp = sample.old_logp - np.float32(0.5)
    samples[1].rollout_logp = present(samples[1].old_logp) + np.float32(2.0)
    tally_update(tally, samples, 20)
    metrics = metrics_of(tally)
    assert metrics["train/num_sequences"] == len(samples) == 9
    assert metrics["train/num_tokens"] == sum(len(s.tokens) for s in samples)
    assert metrics["train/num_response_tokens"] == sum(s.num_response_tokens for s in samples)
    assert metrics["train/staleness"] == pytest.approx(4.0)
    assert metrics["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(2.0)
    assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(SUMS["mismatch_abs"] / 230)
    quiet = Tally()
    tally_update(quiet, samples, 20, old_is_rollout=True)  # the servers' own log-probs show no mismatch
    assert not any("logprob_abs_diff" in name for name in metrics_of(quiet))
