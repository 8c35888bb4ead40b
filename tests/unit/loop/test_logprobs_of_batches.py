"""Each sample gets log-probs of the right weights, and the groups that come in are not changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_dypo.batching.queues import Queues
from megatron_dypo.config.objective import OldLogpConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.logprobs import Logprobs
from megatron_dypo.loop.update import count_totals, open_batch
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.types import SampleKind, Treatment
from tests.support.loop_cases import FakePolicy, OneRank, ThreadRanks, run_in_threads
from tests.support.objective_cases import random_groups


def fresh(version: int = 4) -> list[Any]:
    """Make two traces and three groups of rollouts, as they come in."""
    new: dict[str, Any] = {"old_logp": None, "ref_logp": None, "policy_version": version}
    return [[replace(s, **new) for s in group] for group in random_groups(5, num_hard=2, num_mid=3)]


def logprobs(policy: FakePolicy, *, source: Any = "trainer", is_asynchronous: bool = False, **options: Any) -> Logprobs:
    return Logprobs(
        **{
            "policy": policy,
            "cfg": OldLogpConfig(source=source),
            "reads_reference": True,
            "reads_current": True,
            "is_asynchronous": is_asynchronous,
            "tally": Tally(),
            "timings": Timings(),
            **options,
        }
    )


def at(version: int, **options: Any) -> FakePolicy:
    policy = FakePolicy(**options)
    policy.version = version
    return policy


def rollouts(groups: Sequence[Any]) -> list[Any]:
    return [s for group in groups for s in group if s.treatment is Treatment.REINFORCE]


def test_rollouts_get_log_probs_once_and_traces_none() -> None:
    groups, policy = fresh(), at(4)
    done = logprobs(policy).complete(groups, 4)
    assert all(s.logp_version == 4 and set(s.old_logp) == {-5.0} for s in rollouts(done))
    assert all(s.old_logp is None and s.logp_version is None for g in done for s in g if s not in rollouts(done))
    assert policy.asked == [(4, [s.order for s in rollouts(groups)])], "one pass, oldest first"
    again = logprobs(at(5)).complete(done, 5)
    assert [[s is t for s, t in zip(*pair, strict=True)] for pair in zip(done, again, strict=True)] == [
        [True] * len(group) for group in groups
    ]


def test_the_groups_that_come_in_stay_as_they_are() -> None:
    groups = fresh()
    logprobs(at(4)).complete(groups, 4)
    assert all(s.old_logp is None and s.logp_version is None for s in rollouts(groups))


def test_the_reference_is_the_old_policy_unless_it_has_weights_of_its_own() -> None:
    plain = rollouts(logprobs(at(1)).complete(fresh(), 1))
    assert all((s.ref_logp == s.old_logp).all() for s in plain)
    kept = rollouts(logprobs(at(1, keeps_reference=True)).complete(fresh(), 1))
    assert {float(x) for s in kept for x in s.ref_logp} == {-0.5}
    unread = rollouts(logprobs(at(1, keeps_reference=True), reads_reference=False).complete(fresh(), 1))
    assert {float(x) for s in unread for x in s.ref_logp} == {-2.0}


def test_the_servers_log_probs_are_of_the_weights_that_sampled() -> None:
    policy, groups = at(6), fresh(version=4)
    done = rollouts(logprobs(policy, source="server").complete(groups, 6))
    assert all(s.logp_version == 4 and (s.old_logp == s.rollout_logp).all() for s in done)
    assert not policy.asked


def test_a_check_of_the_servers_is_of_the_oldest_group_alone() -> None:
    policy, groups = at(0), fresh(version=0)
    computed = logprobs(policy, source="server")
    computed.complete(groups, 0, checks_servers=True)
    first = rollouts(groups)[0].order
    assert policy.asked == [(0, [first] * sum(s.order == first for s in rollouts(groups)))]
    errors = [abs(-1.0 - s.rollout_logp).sum() for s in rollouts(groups) if s.order == first]
    assert computed.tally["logprob_error/mean"] == pytest.approx(float(np.sum(errors)), rel=1e-6)
    assert [computed.is_check_due(number) for number in range(3)] == [True, True, True]
    seldom = logprobs(policy, cfg=OldLogpConfig(source="server", check_every=2))
    assert [seldom.is_check_due(number) for number in range(4)] == [True, False, True, False]
    never = logprobs(policy, cfg=OldLogpConfig(source="server", check_every=0))
    assert not never.is_check_due(0)


def test_log_probs_of_another_version_are_computed_anew() -> None:
    done = logprobs(at(4)).complete(fresh(), 4)
    renewed = logprobs(at(6)).renew(done, 6)
    assert all(s.logp_version == 6 and set(s.old_logp) == {-7.0} for s in rollouts(renewed))
    policy = at(6)
    logprobs(policy).renew(renewed, 6)
    assert policy.asked == [(6, [])]


def test_the_current_log_prob_is_of_samples_with_older_ones_alone() -> None:
    groups = logprobs(at(3)).complete(fresh(), 3)
    policy = at(5)
    mixed = logprobs(policy).renew(groups[:3], 5) + groups[3:]
    policy.asked.clear()
    found = logprobs(policy).with_current(mixed, 5)
    assert [s.current_logp_sum for s in rollouts(found[:3])] == [None] * len(rollouts(found[:3]))
    assert [s.current_logp_sum for s in rollouts(found[3:])] == [
        -6.0 * s.num_response_tokens for s in rollouts(found[3:])
    ]
    assert policy.asked == [(5, [s.order for s in rollouts(groups[3:])])]
    assert logprobs(policy, reads_current=False).with_current(mixed, 5) == mixed


def filled(groups: Sequence[Any]) -> Queues:
    queues = Queues()
    for group in groups:
        queues.put(group)
    return queues


BATCHING = BatchingConfig(prompts_per_update=2, updates_per_batch=2, epochs_per_batch=3)


def test_a_synchronous_batch_is_the_oldest_and_the_rest_waits_with_log_probs_too() -> None:
    queues = filled(fresh())
    batch = open_batch(queues, logprobs(at(4)), OneRank(), BATCHING, version=4)
    assert (batch.orders, batch.passes, batch.position) == ((0, 1, 2, 3), 3, 0)
    assert queues.orders() == [4]
    assert all(s.logp_version == 4 for s in rollouts([*batch.groups, *queues.groups()]))


def test_an_asynchronous_batch_has_log_probs_of_one_version_and_the_rest_waits_as_it_is() -> None:
    early = logprobs(at(2)).complete(fresh()[2:4], 2)
    queues = filled([*fresh()[:2], *early, *fresh()[4:]])
    batch = open_batch(queues, logprobs(at(4), is_asynchronous=True), OneRank(), BATCHING, version=4)
    assert {s.logp_version for s in rollouts(batch.groups)} == {4}
    assert {s.logp_version for s in rollouts(queues.groups())} == {None}


@pytest.mark.parametrize("ranks_per_replica", [1, 2])
def test_a_batch_is_the_oldest_over_all_replicas_and_known_on_all_ranks(ranks_per_replica: int) -> None:
    groups = fresh()

    def open_here(ranks: ThreadRanks) -> Any:
        own = groups[:1] if ranks.replica == 0 else groups[1:]
        queues = filled(own if ranks.is_leader else [])
        batch = open_batch(queues, logprobs(at(4, is_leader=ranks.is_leader)), ranks, BATCHING, version=4)
        totals = count_totals(batch.groups, ranks)
        return batch.orders, [g[0].order for g in batch.groups], totals.num_prompts, queues.orders()

    found = run_in_threads(2 * ranks_per_replica, open_here, ranks_per_replica)
    assert {(orders, prompts) for orders, _, prompts, _ in found} == {((0, 1, 2, 3), 4)}
    assert [own for _, own, _, _ in found[::ranks_per_replica]] == [[0], [1, 2, 3]]
    assert [waiting for *_, waiting in found[::ranks_per_replica]] == [[], [4]]
    assert all(own == waiting == [] for _, own, _, waiting in found[1::2]) or ranks_per_replica == 1


def test_the_experts_of_the_pass_for_the_old_policy_stay_with_the_samples() -> None:
    done = rollouts(logprobs(at(4), replay="trainer").complete(fresh(), 4))
    assert all((s.routes == 4).all() and len(s.routes) == len(s.tokens) for s in done)
    assert all(set(s.old_logp) == {-5.25} for s in done)
    renewed = rollouts(logprobs(at(6), replay="trainer", is_asynchronous=True).renew([done], 6))
    assert all((s.routes == 6).all() for s in renewed)


def test_traces_keep_the_experts_that_the_router_chooses() -> None:
    done = logprobs(at(4), replay="trainer").complete(fresh(), 4)
    assert all(s.routes is None for group in done for s in group if s.kind is SampleKind.TRACE)


def test_a_check_measures_what_the_replay_changes_on_the_oldest_group() -> None:
    groups = fresh(version=0)
    computed = logprobs(at(0), replay="rollout")
    done = rollouts(computed.complete(groups, 0, checks_servers=True))
    assert all(set(s.old_logp) == {-1.0} for s in done)
    first = [s for s in done if s.order == done[0].order]
    tokens = sum(s.num_response_tokens for s in first)
    for name, logp in (("replay", -1.0), ("own_choice", -1.25)):
        gap = sum(float(abs(logp - s.rollout_logp).sum(dtype="float64")) for s in first)
        assert computed.tally[f"gap/{name}"] == pytest.approx(gap, rel=1e-6)
        assert computed.tally[f"gap/{name}/tokens"] == tokens
    unmeasured = logprobs(at(0), replay="rollout")
    unmeasured.complete(fresh(version=0), 0)
    assert not unmeasured.tally
