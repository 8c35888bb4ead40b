"""The position of ranks in the mesh, the ranks of a replica, and the ranks that send the policy out of the mesh."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.parallel.mesh import Mesh


@st.composite
def meshes(draw):
    small = st.integers(1, 3)
    expert, expert_tensor, tensor, context = (draw(small) for _ in range(4))
    data = expert * expert_tensor * draw(small)
    return Mesh(
        tensor=tensor,
        pipeline=draw(small),
        context=context,
        data=data,
        expert=expert,
        expert_tensor=expert_tensor,
    )


@given(mesh=meshes())
def test_coordinates_count_through_the_axes_in_megatrons_order(mesh):
    dense = itertools.product(range(mesh.pipeline), range(mesh.data), range(mesh.context), range(mesh.tensor))
    copies = mesh.stage_size // (mesh.expert * mesh.expert_tensor)
    experts = itertools.product(range(mesh.pipeline), range(copies), range(mesh.expert), range(mesh.expert_tensor))
    ranks = [mesh.at(rank) for rank in range(mesh.world_size)]
    assert [(r.pp_rank, r.dp_rank, r.cp_rank, r.tp_rank) for r in ranks] == list(dense)
    assert [(r.pp_rank, r.expert_replica, r.ep_rank, r.etp_rank) for r in ranks] == list(experts)


@given(mesh=meshes())
def test_replicas_split_the_world(mesh):
    replicas = [mesh.replica_ranks(dp_rank) for dp_rank in range(mesh.data)]
    assert sorted(itertools.chain(*replicas)) == list(range(mesh.world_size))
    assert all(list(ranks) == sorted(ranks) for ranks in replicas)
    assert all(mesh.at(rank).replica_ranks == ranks for ranks in replicas for rank in ranks)
    # Leaders are ordered by dp_rank, and the global leader leads the first replica.
    assert [ranks[0] for ranks in replicas] == sorted(ranks[0] for ranks in replicas)
    assert [rank for rank in range(mesh.world_size) if mesh.at(rank).is_replica_leader] == [r[0] for r in replicas]
    assert [rank for rank in range(mesh.world_size) if mesh.at(rank).is_global_leader] == [replicas[0][0]]


@given(mesh=meshes())
def test_scoring_ranks_are_the_context_parallel_ranks_of_the_last_stage(mesh):
    for dp_rank in range(mesh.data):
        ranks = [mesh.at(rank) for rank in mesh.replica_ranks(dp_rank)]
        expected = [r for r in ranks if r.is_last_stage and r.tp_rank == 0]
        assert ranks[0].scoring_ranks == tuple(r.rank for r in sorted(expected, key=lambda r: r.cp_rank))


@given(mesh=meshes())
def test_senders_hold_every_shard_of_the_policy_once(mesh):
    senders = [mesh.at(rank) for rank in mesh.sender_ranks()]
    dense = Counter((r.pp_rank, r.tp_rank) for r in senders if r.sends_dense)
    experts = Counter((r.pp_rank, r.ep_rank, r.etp_rank) for r in senders if r.sends_experts)
    assert dense == Counter(itertools.product(range(mesh.pipeline), range(mesh.tensor)))
    assert experts == Counter(itertools.product(range(mesh.pipeline), range(mesh.expert), range(mesh.expert_tensor)))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"data": 2}, (0,)),
        ({"data": 2, "expert": 2}, (0, 1)),
        ({"tensor": 2, "expert": 2}, (0, 1)),
        ({"tensor": 2, "data": 2, "expert": 4, "pipeline": 2}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"tensor": 2, "data": 2, "pipeline": 2}, (0, 1, 4, 5)),
        ({"tensor": 2, "data": 2, "context": 2}, (0, 1)),
    ],
)
def test_senders_are_the_first_tensor_group_and_the_first_expert_group_of_each_stage(axes, expected):
    assert Mesh(**axes).sender_ranks() == expected


def test_data_parallel_ranks_of_tp2_pp2_dp2_lie_between_tensor_and_pipeline():
    assert Mesh(tensor=2, pipeline=2, data=2).replica_ranks(1) == (2, 3, 6, 7)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_mesh_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank={rank}: must be from 0 to 3"):
        Mesh(tensor=4).at(rank)


@pytest.mark.parametrize(
    ("axes", "world_size", "expected"),
    [
        ({}, 3, Mesh(data=3)),
        (
            {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
            8,
            Mesh(tensor=2, pipeline=2, virtual_pipeline=2, data=2),
        ),
        ({"pipeline": 2, "first_stage_layers": 3}, 2, Mesh(pipeline=2, first_stage_layers=3)),
        ({"tensor": 2, "context": 2, "expert": 8}, None, Mesh(tensor=2, context=2, expert=8, data=2)),
        ({"tensor": 2, "num_processes": 6}, None, Mesh(tensor=2, data=3)),
    ],
)
def test_a_config_gives_data_parallelism_what_the_other_axes_leave(axes, world_size, expected):
    assert ParallelConfig(**axes).mesh(world_size) == expected


@pytest.mark.parametrize(
    ("axes", "world_size", "message"),
    [
        ({"tensor": 2}, 3, "world_size=3: must be a multiple of tensor × pipeline × context = 2 × 1 × 1 = 2"),
        ({}, 0, "world_size=0: must be a multiple"),
        ({"expert": 4}, 6, "expert × expert_tensor = 4 × 1: does not divide the 6 ranks of a pipeline stage"),
    ],
)
def test_a_world_that_the_axes_do_not_fill_is_refused(axes, world_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelConfig(**axes).mesh(world_size)


def test_a_mesh_is_plain_data_that_needs_no_torch():
    code = "import sys, megatron_dypo.parallel.mesh; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    mesh = Mesh(tensor=2, pipeline=2, last_stage_layers=3)
    assert Mesh(**json.loads(json.dumps(dataclasses.asdict(mesh)))) == mesh
