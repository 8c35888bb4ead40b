"""Groups of a real world, and how a rank leaves it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.support.dist.spawn import RankError, run_ranks


def rank_layout(axes: dict[str, int]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megatron_dypo.config.tree import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig(**axes))
    replica = torch.tensor([layout.rank])
    dist.broadcast(replica, src=layout.leader_rank, group=layout.replica_group)
    leaders = None
    if layout.leaders_group is not None:
        parts = [torch.zeros(1, dtype=torch.int64) for _ in range(layout.data)]
        dist.all_gather(parts, torch.tensor([layout.rank]), group=layout.leaders_group)
        leaders = torch.cat(parts).tolist()
    context_ranks = tuple(dist.get_process_group_ranks(layout.cp_group))
    close(layout)
    return {
        "leader": replica.item(),
        "leaders": leaders,
        "ranks": layout.replica_ranks,
        "dp_rank": layout.dp_rank,
        "cp_rank": layout.cp_rank,
        "last_stage": layout.is_last_stage,
        "scoring_ranks": layout.scoring_ranks,
        "context_ranks": context_ranks,
        "experts": (layout.etp_rank, layout.ep_rank, layout.expert_replica),
        "sends": (layout.sends_experts, layout.leads_experts),
        "is_leader": (layout.is_replica_leader, layout.is_global_leader),
    }


def rank_with_a_fault() -> None:
    import torch.distributed as dist

    from megatron_dypo.config.tree import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    with contextlib.ExitStack() as stack:
        layout = start_megatron(ParallelConfig(tensor=2))
        stack.callback(close, layout)
        if layout.rank == 1:
            raise ValueError("the answer column is missing")
        dist.barrier(group=layout.tp_group)


def rank_too_few(axes: dict[str, int]) -> str:
    from megatron_dypo.config.tree import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron

    with pytest.raises(ValueError, match="=") as error:
        start_megatron(ParallelConfig(**axes))
    return str(error.value)


def test_pp2_dp2_has_two_replicas_with_a_leader_each() -> None:
    seen = run_ranks(4, rank_layout, {"pipeline": 2})
    assert [s["ranks"] for s in seen] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [s["dp_rank"] for s in seen] == [0, 1, 0, 1]
    assert [s["leader"] for s in seen] == [0, 1, 0, 1]
    assert [s["leaders"] for s in seen] == [[0, 1], [0, 1], None, None]
    assert [s["is_leader"] for s in seen] == [(True, True), (True, False), (False, False), (False, False)]
    assert [s["last_stage"] for s in seen] == [False, False, True, True]
    assert [s["scoring_ranks"] for s in seen] == [(2,), (3,), (2,), (3,)]
    assert [s["context_ranks"] for s in seen] == [(0,), (1,), (2,), (3,)]


def test_context_parallel_ranks_share_a_replica() -> None:
    seen = run_ranks(4, rank_layout, {"pipeline": 2, "context": 2})
    assert [s["ranks"] for s in seen] == [(0, 1, 2, 3)] * 4
    assert [s["cp_rank"] for s in seen] == [0, 1, 0, 1]
    assert [s["is_leader"] for s in seen] == [(True, True), (False, False), (False, False), (False, False)]
    assert [s["scoring_ranks"] for s in seen] == [(2, 3)] * 4
    assert [s["context_ranks"] for s in seen] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_ranks_that_split_an_expert_are_nearer_than_those_that_own_others() -> None:
    seen = run_ranks(4, rank_layout, {"expert": 2, "expert_tensor": 2})
    assert [s["experts"] for s in seen] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [s["sends"] for s in seen] == [(True, True), (True, False), (True, True), (True, False)]


def test_a_stage_may_hold_all_experts_several_times() -> None:
    seen = run_ranks(4, rank_layout, {"tensor": 2, "expert_tensor": 2})
    assert [s["experts"] for s in seen] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [s["sends"] for s in seen] == [(True, True), (True, False), (False, False), (False, False)]


def test_a_fault_on_one_rank_ends_the_job_at_once() -> None:
    with pytest.raises(RankError, match="ValueError: the answer column is missing"):
        run_ranks(2, rank_with_a_fault)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 2}, "world_size=1: must be a multiple of tensor × pipeline × context = 2 × 1 × 1 = 2"),
        (
            {"expert_tensor": 2},
            "expert × expert_tensor = 1 × 2: does not divide the 1 ranks of a pipeline stage",
        ),
    ],
)
def test_a_world_that_the_axes_do_not_divide_is_refused(axes, message) -> None:
    assert run_ranks(1, rank_too_few, axes) == [message]
