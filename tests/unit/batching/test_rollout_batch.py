"""A rollout batch as a value: the groups of each minibatch, over replicas and passes, and after a resume."""

import dataclasses
import itertools
import json

import pytest

from megatron_dypo.batching.rollout_batch import RolloutBatch
from tests.support.objective_cases import random_groups

GROUPS = random_groups(9, num_hard=2, num_mid=3)
ORDERS = tuple(group[0].order for group in GROUPS)


def orders_of(groups):
    return [group[0].order for group in groups]


def minibatches(batch, count):
    """Return all minibatches of ``count`` groups, until the batch is used up."""
    found = []
    while not batch.is_used_up:
        minibatch, batch = batch.next_minibatch(count)
        found.append(minibatch)
    return found


def whole(passes, orders=ORDERS):
    return RolloutBatch(orders=orders, groups=tuple(g for g in GROUPS if g[0].order in orders), passes=passes)


def by_turns(orders, passes, count):
    """Apply the rule in another form: each group has a number of updates left; those with the most go first, by age."""
    left, found = dict.fromkeys(orders, passes), []
    while left:
        turn = sorted(left, key=lambda order: (-left[order], order))[:count]
        found.append(sorted(turn))
        for order in turn:
            left[order] -= 1
            if not left[order]:
                del left[order]
    return found


@pytest.mark.parametrize(
    ("orders", "passes", "count"), itertools.product([ORDERS, ORDERS[:3], ORDERS[:1]], [1, 2, 3], range(1, 7))
)
def test_minibatches_go_over_the_groups_pass_after_pass(orders, passes, count):
    found = [orders_of(minibatch.groups) for minibatch in minibatches(whole(passes, orders), count)]
    assert found == by_turns(orders, passes, count)


def test_a_short_minibatch_is_filled_up_from_the_next_pass():
    assert [orders_of(m.groups) for m in minibatches(whole(2, ORDERS[:3]), 2)] == [[0, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize(("passes", "count"), [(1, 2), (1, 4), (2, 2), (1, 5)])
def test_a_batch_over_uneven_replicas_ends_on_all_of_them_at_once(passes, count):
    """The first replica holds one of five groups and is empty early; a follower holds none."""
    parts = [GROUPS[:1], GROUPS[1:], []]
    replicas = [RolloutBatch(orders=ORDERS, groups=tuple(part), passes=passes) for part in parts]
    found = [minibatches(replica, count) for replica in replicas]
    assert len({len(part) for part in found}) == 1
    for together in zip(*found, strict=True):
        assert len({minibatch.is_last for minibatch in together}) == 1
    assert [minibatch.is_last for minibatch in found[0]] == [False] * (len(found[0]) - 1) + [True]
    assert len(found[0]) == -(-5 * passes // count)
    entered = [order for part in found for minibatch in part for order in orders_of(minibatch.groups)]
    assert sorted(entered) == sorted([*ORDERS] * passes)


def test_each_group_is_finished_once_by_its_last_update_and_held_until_then():
    batch, finished = whole(2), []
    for entered in range(1, 6):
        minibatch, batch = batch.next_minibatch(2)
        finished += orders_of(minibatch.finished)
        assert sorted([*finished, *orders_of(batch.groups)]) == [*ORDERS]
        assert orders_of(batch.groups) == batch.open_orders()
        assert {order: batch.passes_left(order) for order in ORDERS} == {
            order: 2 - (2 * entered + 4 - i) // 5 for i, order in enumerate(ORDERS)
        }
    assert finished == [*ORDERS]
    assert batch.is_used_up


def test_taking_a_minibatch_leaves_the_batch_as_it_was():
    batch = whole(1)
    first, _ = batch.next_minibatch(2)
    again, _ = batch.next_minibatch(2)
    assert first.groups == again.groups
    assert (batch.position, batch.groups) == (0, tuple(GROUPS))


@pytest.mark.parametrize("done", range(6))
def test_a_stored_batch_goes_on_where_it_stopped_whoever_holds_its_groups(done):
    batch = whole(2)
    for _ in range(done):
        _, batch = batch.next_minibatch(2) if not batch.is_used_up else (None, batch)
    stored = json.loads(json.dumps(batch.as_json()))
    for shared in ([batch.groups], [batch.groups[::2], batch.groups[1::2]]):
        parts = [minibatches(RolloutBatch.from_json(stored, part), 2) for part in shared]
        together = [
            (sorted(order for m in at_once for order in orders_of(m.groups)), at_once[0].is_last)
            for at_once in zip(*parts, strict=True)
        ]
        assert together == [(orders_of(m.groups), m.is_last) for m in minibatches(batch, 2)]


def test_groups_of_others_are_not_taken_into_a_stored_batch():
    batch = RolloutBatch.from_json({"orders": [1, 3], "passes": 1, "position": 0}, GROUPS[::-1])
    assert orders_of(batch.groups) == [1, 3]


def test_a_batch_without_groups_is_used_up():
    assert RolloutBatch().is_used_up
    assert not whole(1).is_used_up


def test_other_samples_take_the_places_of_the_batch_s_own():
    weighted = [[dataclasses.replace(s, reward=3.0) for s in group] for group in GROUPS]
    batch = whole(1).with_groups(weighted)
    minibatch, _ = batch.next_minibatch(5)
    assert [s.reward for s in minibatch.samples] == [3.0] * sum(map(len, GROUPS))
