"""Who gets which sample, and when a rollout batch is used up, over replicas that hold different numbers of groups."""

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_dypo.batching.exchange import balance, num_tokens, owners
from megatron_dypo.batching.queues import Queues, is_used_up, oldest
from megatron_dypo.batching.wire import without_arrays
from tests.support.objective_cases import random_groups


class OneLeader:
    """The group of a run with one replica."""

    def size(self):
        return 1


def test_work_is_shared_by_cost_not_by_number():
    work = [(0, 0, 100.0), (1, 0, 20.0), (2, 0, 20.0), (3, 0, 20.0), (4, 0, 20.0), (5, 0, 20.0)]
    shares = owners(work, 2)
    assert len({shares[order, 0] for order in range(1, 6)}) == 1
    assert shares[0, 0] != shares[1, 0]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_shares_do_not_depend_on_who_holds_what(replicas):
    rng = np.random.default_rng(2)
    work = [(order, member, float(rng.integers(1, 9) ** 2)) for order in range(7) for member in range(3)]
    shares = owners(iter(work), replicas)
    assert shares.keys() == {(order, member) for order, member, _ in work}
    assert owners([work[i] for i in rng.permutation(len(work))], replicas) == shares
    loads = [sum(cost for order, member, cost in work if shares[order, member] == r) for r in range(replicas)]
    assert max(loads) - min(loads) <= max(cost for *_, cost in work)


def test_samples_of_one_replica_come_back_in_the_order_of_prompts_and_members():
    samples = [s for g in random_groups(4) for s in g]
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    assert balance(shuffled, OneLeader(), num_tokens) == samples


def test_a_samples_work_is_its_tokens_where_nothing_else_is_said():
    sample = random_groups(4)[0][0]
    assert num_tokens(sample) == len(sample.tokens)


def replica(groups, epochs):
    queues = Queues()
    for group in groups:
        queues.put(group)
    queues.open_batch([g[0].order for g in groups], epochs=epochs)
    return queues


@pytest.mark.parametrize(("epochs", "count"), [(1, 2), (1, 4), (2, 2), (1, 5)])
def test_a_batch_over_uneven_replicas_is_used_up_when_the_last_of_them_is(epochs, count):
    """The first replica holds one group of five and is empty long before; each group enters each pass once."""
    groups = random_groups(9, num_hard=2, num_mid=3)
    replicas = [replica(groups[:1], epochs), replica(groups[1:], epochs)]
    drawn, was_last = [], []
    while any(queues.batch for queues in replicas):
        turns = oldest([queues.turns() for queues in replicas], count)
        drawn += [g[0].order for queues in replicas for g in queues.draw(turns)]
        was_last.append(is_used_up(len(queues.batch) for queues in replicas))
    assert was_last == [False] * (len(was_last) - 1) + [True]
    assert len(was_last) == -(-5 * epochs // count)
    assert sorted(drawn) == sorted([*range(5)] * epochs)


def test_a_batch_is_used_up_only_where_no_replica_has_a_group():
    for left in itertools.product((0, 1), repeat=3):
        assert is_used_up(left) is (sum(left) == 0)


def test_a_bare_sample_keeps_what_a_forward_pass_reads_and_no_more():
    sample = dataclasses.replace(random_groups(1)[-1][0], weights={"nll_weight": 1.0})
    bare = without_arrays(sample)
    assert (bare.rollout_logp, bare.old_logp, bare.ref_logp, bare.weights) == (None, None, None, None)
    kept = ("order", "member", "treatment", "tokens", "num_prompt_tokens", "policy_version", "is_correct", "reward")
    assert all(getattr(bare, name) is getattr(sample, name) for name in kept)
    assert sample.weights is not None


def test_stale_groups_are_those_beyond_the_limit_not_at_it():
    queues = Queues()
    for version, group in enumerate(random_groups(2, num_hard=2, num_mid=2)):
        queues.put([dataclasses.replace(s, policy_version=version) for s in group])
    assert queues.drop_stale(version=3, max_staleness=3) == 0
    assert queues.drop_stale(version=4, max_staleness=3) == 1
    assert sorted(g[0].policy_version for g in queues.groups()) == [1, 2, 3]


def test_samples_without_scores_come_oldest_first_from_the_batch_and_from_what_waits():
    queues, groups = Queues(), random_groups(2, num_hard=1, num_mid=4)
    for group in groups:
        queues.put(group)
    for group in (groups[1], groups[3], groups[4]):
        for sample in group:
            sample.old_logp = None
    queues.open_batch([4], epochs=1)
    assert [s.order for s in queues.unscored()] == [1] * 4 + [3] * 4 + [4] * 4
