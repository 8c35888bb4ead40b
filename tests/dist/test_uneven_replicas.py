"""A rollout batch whose groups the replicas hold unevenly: one of them has drawn its last before the others."""

from __future__ import annotations

from pathlib import Path

from tests.dist.spawn import run_ranks


def rank_take(folder: str) -> list[tuple[list[int], int, bool]]:
    """The mini-batches of a batch of four, of which this rank holds the older or the newer half."""
    import torch.distributed as dist

    from megatron_dypo.stages import open_batch, take_batch
    from tests.unit.loop_cases import make_config, make_run
    from tests.unit.objective_cases import random_groups

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = make_config(folder, batching={"prompts_per_update": 2, "updates_per_batch": 2})
    run = make_run(["http://127.0.0.1:9"], config, group=dist.group.WORLD, data=2, dp_rank=rank)
    for group in random_groups(5, num_hard=2, num_mid=2):
        if group[0].order // 2 == rank:
            run.leader.queues.put(group)
    open_batch(run)
    batches = [take_batch(run) for _ in range(2)]
    dist.barrier()
    dist.destroy_process_group()
    return [([g[0].order for g in batch.groups], batch.totals.num_prompts, batch.is_last) for batch in batches]


def test_a_batch_is_used_up_when_no_replica_has_a_group_left(tmp_path: Path) -> None:
    first, second = run_ranks(2, rank_take, str(tmp_path))
    assert first == [([0, 1], 2, False), ([], 2, True)]
    assert second == [([], 2, False), ([2, 3], 2, True)]
