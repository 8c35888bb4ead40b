"""Counts of a step while it collects: each has its own name, and each share its own denominator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dypo.loop.books.step_metrics import performance_metrics, rollout_metrics, update_metrics
from megatron_dypo.loop.books.tally import (
    Tally,
    tally_client,
    tally_dropped,
    tally_groups,
    tally_logprob_error,
    tally_refit,
    tally_work,
)
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.types import DropReason, GradedGroup, SampleKind, Totals, Verdict
from tests.support.graded_groups import graded


def without_verdict(order: int) -> GradedGroup:
    """Make a group of three: one right, one wrong, and one on which the verifier failed."""
    group = graded(order, [True, False, False])
    verdicts = (*group.verdicts[:2], Verdict(is_correct=False, reward=0.0, error="KeyError"))
    return replace(group, verdicts=verdicts, tier=None)


def test_a_rollout_without_a_verdict_is_neither_right_nor_wrong() -> None:
    tally = Tally()
    tally_groups(tally, [graded(0, [True, True]), without_verdict(1), replace(graded(2, []), tier=None)])
    metrics = rollout_metrics(tally)
    assert metrics["rollout/accuracy"] == pytest.approx(3 / 4)
    assert metrics["rollout/reward"] == pytest.approx((0.9 + 0.9 + 0.9 - 0.1) / 4)
    assert (metrics["rollout/verifier_errors"], metrics["rollout/groups_without_verdict"]) == (1, 1)
    assert (metrics["rollout/num_rollouts"], metrics["rollout/num_prompts"]) == (5, 3)
    assert metrics["gate/easy"] == 1.0, "of the graded prompts"


def test_rollouts_are_counted_by_their_tokens_their_ends_and_their_weights() -> None:
    group = graded(0, [True, False, False], versions=[3, 6, 6])
    long = replace(group.rollouts[0], tokens=np.array([5, 6, 7, 8], np.int32), finish="length")
    tally = Tally()
    tally_groups(tally, [replace(group, rollouts=(long, *group.rollouts[1:]))])
    metrics = rollout_metrics(tally)
    assert metrics["rollout/truncated_ratio"] == pytest.approx(1 / 3)
    lengths = [metrics[f"rollout/response_len/{name}"] for name in ("mean", "max", "min")]
    assert (lengths, metrics["rollout/num_tokens"]) == ([pytest.approx(8 / 3), 4, 2], 8)
    assert metrics["rollout/policy_version"] == 5
    assert metrics["rollout/prompt_len/mean"] == 3


def test_each_reason_of_a_prompt_without_a_group_has_its_own_count() -> None:
    prompt, tally = graded(0, []).prompt, Tally()
    reasons = [DropReason.INCOMPLETE, DropReason.REFUSED, DropReason.REFUSED]
    tally_dropped(tally, [DroppedGroup(prompt=prompt, reason=reason, message="why") for reason in reasons])
    metrics = rollout_metrics(tally)
    assert (metrics["rollout/incomplete_groups"], metrics["rollout/refused_prompts"]) == (1, 2)


def test_what_clients_lost_adds_up_over_attempts_and_replicas_but_for_the_longest() -> None:
    total = Tally()
    for scale in (1, 2):
        replica = Tally()
        replica.add("asked")
        for part in (1, 10):
            counts = ClientCounts(
                retries=scale * part,
                wrong_versions=2 * scale * part,
                dropped_rollouts=3 * scale * part,
                dropped_tokens=4 * scale * part,
                dropped_longest=5 * scale * part,
            )
            tally_client(replica, counts)
        total.merge(replica)
    metrics = rollout_metrics(total)
    names = ("retries", "wrong_versions", "dropped_rollouts", "dropped_tokens", "dropped_longest")
    assert [metrics[f"rollout/{name}"] for name in names] == [33, 66, 99, 132, 100]


def test_servers_lost_and_won_and_tried_again_are_three_counts() -> None:
    tally = Tally()
    for _ in range(2):
        tally_refit(
            tally, RefitReport(version=1, seconds=1.0, pause_seconds=0.5, bytes=64, fenced=1, rejoined=2, retries=3)
        )
    metrics = rollout_metrics(tally)
    assert [metrics[f"refit/{name}"] for name in ("fenced", "rejoined", "retries")] == [2, 4, 6]


def test_counts_of_the_data_and_of_the_queues_go_under_their_own_names() -> None:
    names = {
        "data/dropped_prompts": "dropped_prompts",
        "data/dropped_traces": "dropped_traces",
        "data/wrong_traces": "wrong_traces",
        "gate/hard_without_teacher": "hard_without_teacher",
        "queue/stale": "stale",
        "queue/distill": "queue/distill",
        "queue/reinforce": "queue/reinforce",
        "queue/mix": "queue/mix",
        "data/epoch": "max:epoch",
    }
    tally = Tally({key: float(value) for value, key in enumerate(names.values(), start=3)})
    metrics = rollout_metrics(tally)
    assert {name: metrics[name] for name in names} == {name: float(value) for value, name in enumerate(names, start=3)}


def test_without_traces_there_is_no_loss_of_traces_and_without_rollouts_none_of_theirs() -> None:
    kinds = {SampleKind.TRACE: 1, SampleKind.ROLLOUT: 2}
    totals = Totals(num_prompts=2, num_sequences=kinds, num_response_tokens=kinds)

    def names(tokens: float, rollout_tokens: float) -> set[str]:
        sums = dict.fromkeys([metric.of for metric in LOSS_METRICS], 1.0)
        sums |= {"trace_tokens": tokens - rollout_tokens, "rollout_tokens": rollout_tokens, "rollouts": 1.0}
        return set(update_metrics(Tally(), totals, sums, LOSS_METRICS))

    assert "train/sft_loss" not in names(5, 5)
    assert "train/pg_loss" in names(5, 5)
    assert "train/sft_loss" in names(5, 0)
    assert "train/pg_loss" not in names(5, 0)


def test_rates_are_of_the_time_that_each_part_took() -> None:
    tally = Tally({"tokens": 600.0, "sampled_tokens": 90.0})
    timings = {"timing_s/step": 10.0, "timing_s/gen": 3.0, "timing_s/update_actor": 4.0}
    assert performance_metrics(tally, timings, 4) == {
        "perf/tokens_per_sec": 60.0,
        "perf/tokens_per_gpu_per_sec": 15.0,
        "perf/wait_time_ratio": 0.3,
        "perf/rollout_tokens_per_sec": 30.0,
        "perf/update_tokens_per_sec": 150.0,
    }
    assert performance_metrics(tally, {}, 4) == {}


def test_mfu_is_the_share_of_the_data_sheets_rate_in_the_time_of_the_update() -> None:
    tally = Tally()
    for _ in range(2):  # replicas; one of them computes twice as much as it needs
        tally_work(tally, 1200.0, 600.0)
    timings = {"timing_s/step": 10.0, "timing_s/update_actor": 4.0}
    assert performance_metrics(tally, timings, 8, rate=100.0)["perf/mfu"] == 1200.0 / (4.0 * 8 * 100.0)
    assert "perf/mfu" not in performance_metrics(tally, timings, 8), "a GPU without a data sheet, or a CPU"


def test_errors_of_long_responses_are_summed_in_double() -> None:
    tally = Tally()
    tally_logprob_error(tally, np.array([1e8, 1.0, -1e8], np.float32))
    assert tally["logprob_error/sequence"] == 1.0
    assert tally["logprob_error/mean"] == 2e8 + 1
