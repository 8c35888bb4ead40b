import dataclasses

import numpy as np

from megatron_dypo.batching.queues import Queues, dump_samples, load_samples, oldest
from megatron_dypo.config.tree import BatchingConfig
from megatron_dypo.types import TokenWeights, Treatment
from tests.unit.objective_cases import random_groups


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
    orders = [g[0].order for g in queues.groups()]
    assert orders == [0, 1, 2, 3, 4]
    queues.open_batch(oldest([orders], 3), epochs=1)
    assert [order for _, order in queues.turns()] == [0, 1, 2]
    assert len(queues) == 2


def draws(queues, count):
    """Orders of each mini-batch of ``count`` groups, until the batch is used up."""
    seen = []
    while queues.batch:
        seen.append([g[0].order for g in queues.draw(oldest([queues.turns()], count))])
        assert seen[-1], "a batch with groups gives a mini-batch"
        assert len(seen) < 20, "it ends"
    return seen


def test_a_batch_is_drawn_pass_after_pass_while_others_wait():
    queues = filled([0] * 5)
    queues.open_batch([0, 1, 2, 3, 77], epochs=2)
    assert draws(queues, 2) == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [g[0].order for g in queues.groups()] == [4]
    queues = filled([0] * 5)
    queues.open_batch([0, 1, 2], epochs=2)
    assert draws(queues, 2) == [[0, 1], [0, 2], [1, 2]]


def test_what_is_left_of_a_batch_survives_a_checkpoint():
    queues, restored = filled([0] * 5), Queues()
    queues.open_batch([0, 1, 2, 3], epochs=2)
    for _ in range(3):
        queues.draw(oldest([queues.turns()], 2))
    for group in (*queues.batch, *queues.groups()):
        restored.put(load_samples(dump_samples(group)))
    assert restored.turns() == queues.turns() == [(-1, 2), (-1, 3)]
    assert [g[0].order for g in restored.groups()] == [4]


def test_the_oldest_are_chosen_over_all_replicas():
    assert oldest([[5, 1], [], [0, 9, 2]], 3) == [0, 1, 2]
    assert oldest([[5], [4]], 10) == [4, 5]
    assert oldest([[(-1, 5), (-2, 9)], [(-1, 2)]], 2) == [(-2, 9), (-1, 2)]


def test_groups_older_than_the_limit_are_dropped_and_counted():
    queues = filled([0, 1, 2, 3, 4])
    assert queues.drop_stale(version=5, max_staleness=2) == 3
    assert sorted(g[0].policy_version for g in queues.groups()) == [3, 4]


def test_staleness_counts_rollout_batches_whatever_their_number_of_updates():
    cfg = BatchingConfig(prompts_per_update=4, updates_per_batch=3, epochs_per_batch=2, max_staleness=1)
    assert cfg.prompts_per_batch == 12
    queues = filled([0, 6, 6, 12, 12])  # a batch is six versions
    assert queues.drop_stale(version=12, max_staleness=cfg.max_version_lag) == 1


def test_unscored_are_the_rollouts_without_old_log_probs():
    queues = filled([0] * 5)
    assert queues.unscored() == []
    group = next(g for g in queues.groups() if g[0].treatment is Treatment.REINFORCE)
    group[1].old_logp = None
    assert queues.unscored() == [group[1]]
    queues.open_batch([group[0].order], epochs=1)
    assert queues.unscored() == [group[1]]


def test_a_batch_is_scored_by_one_version_whatever_was_scored_before():
    queues = filled([0] * 5)
    reinforced, other = [g for g in queues.groups() if g[0].treatment is Treatment.REINFORCE][:2]
    for sample in (*reinforced, *other):
        sample.scored_version = 3
    assert queues.not_scored_by(4) == []
    queues.open_batch([reinforced[0].order], epochs=1)
    assert queues.not_scored_by(4) == reinforced
    assert queues.not_scored_by(3) == []


def test_samples_survive_the_wire_bit_for_bit():
    samples = [s for g in random_groups(7) for s in g]
    weights = TokenWeights(advantage=0.1, surrogate=0.7, kl=0.03, nll=-1 / 3, anchor=0.2)
    samples[0] = dataclasses.replace(samples[0], weights=weights, current_logp_sum=-3.7, updates_left=3)
    restored = load_samples(dump_samples(samples))
    assert len(restored) == len(samples)
    for before, after in zip(samples, restored, strict=True):
        for field in dataclasses.fields(before):
            one, other = getattr(before, field.name), getattr(after, field.name)
            if isinstance(one, np.ndarray):
                np.testing.assert_array_equal(one, other, strict=True)
            else:
                assert one == other, field.name
    assert load_samples(dump_samples([])) == []
