"""The loop's state in a checkpoint, and runs of any number of replicas that go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.batching.wire import dump_samples
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.replica import Follower
from megatron_dypo.loop.requests import NoStream
from megatron_dypo.loop.resume import drawn_state, require_known_state, restore_batch
from tests.support.loop_cases import OneRank, Prompts, ThreadRanks, make_config, make_leader, run_in_threads
from tests.support.objective_cases import random_groups

GROUPS = random_groups(3, num_hard=2, num_mid=3)


class Stored:
    """A checkpoint in memory."""

    def __init__(self, batch: RolloutBatch, leader_states: list[bytes]) -> None:
        self.trainer_state: dict[str, Any] = {"batch": batch.as_json()}
        self.leader_states = leader_states


def stored(batch: RolloutBatch, parts: Any = (GROUPS[1::2], GROUPS[::2])) -> Stored:
    return Stored(batch, [dump_samples([s for g in part for s in g]) for part in parts])


def keys(groups: Any) -> list[list[tuple[int, int]]]:
    return [[(s.order, s.member) for s in group] for group in groups]


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("orders", [(), (0, 1, 2)])
def test_what_waited_is_shared_as_whole_groups_whatever_the_number_of_replicas(
    tmp_path: Path, replicas: int, orders: tuple[int, ...]
) -> None:
    before = RolloutBatch(orders=orders, groups=tuple(GROUPS[: len(orders)]))
    queues, batches = [], []
    for number in range(replicas):
        leader = make_leader(make_config(tmp_path), OneRank(replica=number, replicas=replicas), Prompts())
        batches.append(keys(restore_batch(stored(before), leader, tmp_path).groups))
        queues.append(keys(leader.queues.groups()))
    held = [[*batch, *queue] for batch, queue in zip(batches, queues, strict=True)]
    members = sorted(key for groups in held for group in groups for key in group)
    assert members == [(s.order, s.member) for g in GROUPS for s in g]
    assert all(len({order for order, _ in group}) == 1 for groups in held for group in groups)
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for number, groups in enumerate(held):
        assert {order % replicas for group in groups for order, _ in group} <= {number}, "the replica of the draw"
    assert {order for batch in batches for group in batch for order, _ in group} == set(orders)


def test_a_follower_knows_where_the_batch_is_and_holds_nothing_of_it(tmp_path: Path) -> None:
    _, before = RolloutBatch(orders=(0, 1, 2, 3), passes=2).next_minibatch(3)
    batch = restore_batch(stored(before), Follower(), tmp_path)
    assert (batch.orders, batch.passes, batch.position, batch.groups) == ((0, 1, 2, 3), 2, 3, ())


def test_a_checkpoint_that_lacks_a_group_of_its_batch_is_named(tmp_path: Path) -> None:
    leader = make_leader(make_config(tmp_path), OneRank(), Prompts())
    with pytest.raises(
        ValueError, match=r"c/step_000002: the files leader_\*.bin lack draws \[9\] of the rollout batch"
    ):
        restore_batch(stored(RolloutBatch(orders=(0, 9))), leader, Path("c/step_000002"))
    _, open_batch = RolloutBatch(orders=(0, 9), groups=()).next_minibatch(1)
    with pytest.raises(ValueError, match=r"draws \[9\]"):
        restore_batch(stored(open_batch), leader, tmp_path)
    broken = Stored(RolloutBatch(), [b"\0" * 100])
    with pytest.raises(ValueError, match=r"c/step_000002: a file leader_\*.bin is damaged"):
        restore_batch(broken, leader, Path("c/step_000002"))


def test_a_checkpoint_that_another_version_wrote_is_named_with_what_it_lacks() -> None:
    whole = {"cursor": 16, "unfinished": [], "ledger": {}, "batches": 2, "batch": {}, "inputs": {}}
    require_known_state(Path("c/step_000002"), whole | {"of_a_later_version": 1})
    first_release = {key: whole[key] for key in ("cursor", "unfinished", "batches", "batch")}
    with pytest.raises(ValueError, match=r"^c/step_000002/trainer_state.json: trainer: has no inputs, ledger: "):
        require_known_state(Path("c/step_000002"), first_release)


def test_draws_that_a_replica_is_behind_with_are_in_flight_for_the_run_that_resumes(tmp_path: Path) -> None:
    """Replica 0 has drawn up to 10, replica 1 up to 6. Each has one prompt in flight; nobody has drawn 7 and 9 yet."""

    def state_of(ranks: ThreadRanks) -> dict[str, Any]:
        leader = make_leader(make_config(tmp_path), ranks, Prompts(too_long=[2]))
        leader.draws.take(10 if ranks.replica == 0 else 6)
        leader.draws.unfinished = [Prompts().prompt(4 + ranks.replica)]
        return drawn_state(leader if ranks.is_leader else Follower(), NoStream(), ranks)

    for ranks_per_replica in (1, 2):
        states = run_in_threads(2 * ranks_per_replica, state_of, ranks_per_replica)
        assert all(state == states[0] for state in states), "the same on every rank"
        assert (states[0]["cursor"], states[0]["unfinished"]) == (10, [4, 5, 7, 9])
        ledger = Ledger.from_json(states[0]["ledger"])
        assert (ledger.drawn, sum(ledger.dropped.values())) == (10, 1)
