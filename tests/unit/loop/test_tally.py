import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.loop.books.tally import (
    Tally,
    performance_metrics,
    rollout_metrics,
    tally_groups,
    tally_sums,
    tally_work,
    update_metrics,
)
from megatron_dypo.metrics.names import lookup
from megatron_dypo.objective.loss import sum_names
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.types import Totals, Treatment
from tests.support.graded_groups import graded


def test_merging_adds_sums_and_keeps_extremes():
    one, other = Tally(), Tally()
    for tally, values in ((one, (3, 5)), (other, (4, 9))):
        for value in values:
            tally.add("n", value)
            tally.extreme("max:n", value)
            tally.extreme("min:n", value)
    one.merge(other)
    assert one == {"n": 21, "max:n": 9, "min:n": 3}
    assert one.ratio("n", "absent") is None, "a mean over nothing is no number"


def test_tiers_are_fractions_of_the_graded_prompts():
    tally = Tally()
    tally_groups(
        tally, [graded(0, [True, True]), graded(1, [True, False]), graded(2, [False, False]), graded(3, [False, True])]
    )
    metrics = rollout_metrics(tally)
    assert [metrics[f"gate/{tier}"] for tier in ("easy", "mid", "hard")] == [0.25, 0.5, 0.25]
    assert metrics["rollout/accuracy"] == 0.5
    assert metrics["rollout/reward"] == pytest.approx(0.4)
    assert metrics["rollout/response_len/mean"] == 2


def test_a_step_without_rollouts_reports_no_gate():
    assert not any(name.startswith(("rollout/", "gate/easy")) for name in rollout_metrics(Tally()))


def test_imbalance_is_the_largest_replica_over_the_mean_one():
    total = Tally()
    for flops in (1e15, 2e15, 1.5e15):
        replica = Tally()
        tally_work(replica, flops)
        total.merge(replica)
    kinds = {Treatment.DISTILL: 1, Treatment.REINFORCE: 2}
    totals = Totals(num_prompts=2, num_sequences=kinds, num_response_tokens=kinds)
    metrics = update_metrics(total, totals, {}, ())
    assert metrics["train/flops_imbalance"] == pytest.approx(1 / 3)


def test_every_metric_name_is_in_the_table():
    tally = Tally()
    tally_groups(tally, [graded(0, [True, False])])
    for key in ("teachers", "teacher/verbose", "sequences", "tokens"):
        tally.add(key)
    tally_work(tally, 1.0)
    kinds = {Treatment.DISTILL: 1, Treatment.REINFORCE: 2}
    totals = Totals(num_prompts=2, num_sequences=kinds, num_response_tokens=kinds)
    dypo = build_objective(ObjectiveConfig())
    tally_sums(tally, dict.fromkeys([metric.of for metric in dypo.metrics], 1.0))
    tally_sums(tally, {"gal_groups": 1.0, "gal_members": 4.0})
    sums = dict.fromkeys(sum_names(dypo.loss, dypo.streams), 1.0)
    metrics = rollout_metrics(tally) | update_metrics(tally, totals, sums, dypo.metrics)
    metrics |= performance_metrics(tally, {"timing_s/step": 2.0}, 4)
    for name in metrics:
        lookup(name, dypo.metrics)
    assert metrics.keys() >= {metric.name for metric in dypo.metrics}
    assert metrics["gate/offline_share_sequences"] == pytest.approx(1 / 3)
    assert metrics["teacher/verbose/share"] == 1
