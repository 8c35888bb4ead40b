"""Samples between replicas and inside one, over real gloo groups."""

import dataclasses

import numpy as np
import pytest
import torch.distributed as dist

from tests.support.dist.spawn import join_world, run_ranks
from tests.support.objective_cases import random_groups
from tests.support.present import present


def work(sample):
    """Return the work of a sequence: a long one costs more than in proportion to its length."""
    return float(len(sample.tokens) ** 2)


def routed(sample):
    """Return the sample with routes; every third has none, and those of some are as large as a file's."""
    if sample.order % 3 == 2:
        return sample
    rng, layers = np.random.default_rng(sample.order), 300_000 if sample.order == 4 else 3
    routes = rng.integers(0, 60_000, (len(sample.tokens) - 1, layers, 2), dtype=np.uint16)
    return dataclasses.replace(sample, routes=routes)


def rank_exchange(seed):
    """Balance three leaders that hold very different shares; then ranks 0 and 1 are one replica of two."""
    from megatron_dypo.batching.exchange import balance, broadcast_samples
    from megatron_dypo.parallel.collectives import broadcast_object, gather_objects

    join_world()
    groups = random_groups(seed, num_hard=4, num_mid=6)
    rank = dist.get_rank()
    owner = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]  # rank 2 holds nothing
    mine = [routed(s) for g, who in zip(groups, owner, strict=True) if who == rank for s in g]
    balanced = balance(mine, present(dist.group.WORLD), work)
    pair = dist.new_group([0, 1], backend="gloo")
    shared = broadcast_samples(balanced if rank == 0 else None, pair) if rank < 2 else []
    word = broadcast_object(f"from {rank}", present(dist.group.WORLD))
    ranks = gather_objects(rank, present(dist.group.WORLD))
    dist.barrier()
    dist.destroy_process_group()
    return balanced, shared, word, ranks


@pytest.fixture(scope="module")
def exchanged():
    return run_ranks(3, rank_exchange, 11), [s for g in random_groups(11, num_hard=4, num_mid=6) for s in g]


def key(sample):
    return sample.order, sample.member


def test_every_sample_arrives_once_and_unchanged(exchanged):
    results, originals = exchanged
    arrived = {key(s): s for balanced, *_ in results for s in balanced}
    assert sum(len(balanced) for balanced, *_ in results) == len(originals) == len(arrived)
    for sample in originals:
        np.testing.assert_array_equal(arrived[key(sample)].tokens, sample.tokens)
        assert arrived[key(sample)].reward == sample.reward
        np.testing.assert_equal(arrived[key(sample)].routes, routed(sample).routes)


def test_replicas_get_equal_work_in_a_fixed_order(exchanged):
    results, originals = exchanged
    loads = [sum(work(s) for s in balanced) for balanced, *_ in results]
    assert max(loads) - min(loads) <= max(work(s) for s in originals)
    for balanced, *_ in results:
        assert [key(s) for s in balanced] == sorted(key(s) for s in balanced)


def test_the_shares_are_those_of_the_given_cost(exchanged):
    from megatron_dypo.batching.exchange import num_tokens, owners

    results, originals = exchanged
    by_cost, by_tokens = (owners([(*key(s), cost(s)) for s in originals], 3) for cost in (work, num_tokens))
    assert by_cost != by_tokens
    assert {key(s): rank for rank, (balanced, *_) in enumerate(results) for s in balanced} == by_cost


def test_a_leaders_samples_reach_its_replica_and_nobody_else(exchanged):
    results, _ = exchanged
    assert [key(s) for s in results[1][1]] == [key(s) for s in results[0][0]]
    assert all(s.routes is None for s in results[1][1]), "routes stay on the leader"
    assert results[2][1] == []


def test_words_and_numbers_are_shared(exchanged):
    results, _ = exchanged
    assert [(word, ranks) for *_, word, ranks in results] == [("from 0", [0, 1, 2])] * 3
