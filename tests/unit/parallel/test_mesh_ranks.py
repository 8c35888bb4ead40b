"""Which ranks make a replica."""

import itertools

import pytest

from megatron_dypo.parallel.layout import replica_ranks, sender_ranks


@pytest.mark.parametrize(
    ("tensor", "context", "pipeline", "data"), itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4))
)
def test_replicas_split_the_world(tensor, context, pipeline, data):
    replicas = [
        replica_ranks(tensor=tensor, context=context, pipeline=pipeline, data=data, dp_rank=d) for d in range(data)
    ]
    assert sorted(itertools.chain(*replicas)) == list(range(tensor * context * pipeline * data))
    assert all(list(ranks) == sorted(ranks) for ranks in replicas)
    # Leaders are ordered by dp_rank, and the global leader leads the first replica.
    assert [ranks[0] for ranks in replicas] == sorted(ranks[0] for ranks in replicas)
    assert replicas[0][0] == 0


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"tensor": 1, "data": 2, "expert_ranks": 1}, (0,)),
        ({"tensor": 1, "data": 2, "expert_ranks": 2}, (0, 1)),
        ({"tensor": 2, "data": 1, "expert_ranks": 2}, (0, 1)),
        ({"tensor": 2, "data": 2, "expert_ranks": 4, "pipeline": 2}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"tensor": 2, "data": 2, "expert_ranks": 1, "pipeline": 2}, (0, 1, 4, 5)),
        ({"tensor": 2, "data": 2, "expert_ranks": 1, "context": 2}, (0, 1)),
    ],
)
def test_senders_are_the_first_tensor_group_and_the_first_expert_group_of_each_stage(axes, expected):
    assert sender_ranks(**{"context": 1, "pipeline": 1, **axes}) == expected


def test_data_parallel_ranks_of_tp2_pp2_dp2_lie_between_tensor_and_pipeline():
    assert replica_ranks(tensor=2, context=1, pipeline=2, data=2, dp_rank=1) == (2, 3, 6, 7)
