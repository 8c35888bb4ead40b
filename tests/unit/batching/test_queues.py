import dataclasses

from megatron_dypo.batching.queues import Queues, oldest
from megatron_dypo.config.training import BatchingConfig
from tests.support.objective_cases import random_groups


def filled(versions):
    queues = Queues()
    for group, version in zip(random_groups(1, num_hard=2, num_mid=3), versions, strict=True):
        queues.put([dataclasses.replace(s, policy_version=version) for s in group])
    return queues


def test_groups_leave_oldest_first_whatever_their_treatment():
    queues = Queues()
    groups = random_groups(3, num_hard=2, num_mid=3)
    for position in (4, 0, 3, 1, 2):
        queues.put(groups[position])
    assert [g[0].order for g in queues.groups()] == queues.orders() == [0, 1, 2, 3, 4]
    taken = queues.take([*oldest([queues.orders()], 3), 77])
    assert [g[0].order for g in taken] == [0, 1, 2]
    assert queues.orders() == [3, 4]
    assert len(queues) == 2


def test_the_oldest_are_chosen_over_all_replicas():
    assert oldest([[5, 1], [], [0, 9, 2]], 3) == [0, 1, 2]
    assert oldest([[5], [4]], 10) == [4, 5]


def test_a_group_is_replaced_in_its_place():
    queues = filled([0] * 5)
    before = queues.groups()
    other = [dataclasses.replace(s, reward=7.0) for s in before[3]]
    queues.replace([other])
    assert queues.groups() == [*before[:3], other, before[4]]
    assert queues.waiting[other[0].treatment].count(other) == 1


def test_groups_older_than_the_limit_are_dropped_and_counted():
    queues = filled([0, 1, 2, 3, 4])
    assert queues.drop_stale(version=5, max_version_lag=2) == 3
    assert sorted(g[0].policy_version for g in queues.groups()) == [3, 4]


def test_staleness_counts_rollout_batches_whatever_their_number_of_updates():
    cfg = BatchingConfig(prompts_per_update=4, updates_per_batch=3, epochs_per_batch=2, max_staleness=1)
    assert cfg.prompts_per_batch == 12
    queues = filled([0, 6, 6, 12, 12])  # a batch is six versions
    assert queues.drop_stale(version=12, max_version_lag=cfg.max_version_lag) == 1


def test_stale_groups_are_those_beyond_the_limit_not_at_it():
    queues = filled([0, 1, 2, 3, 4])
    assert queues.drop_stale(version=4, max_version_lag=4) == 0
    assert queues.drop_stale(version=5, max_version_lag=4) == 1
    assert sorted(g[0].policy_version for g in queues.groups()) == [1, 2, 3, 4]
