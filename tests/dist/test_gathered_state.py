"""Saving gathers the state of a distributed optimizer once for each shard of the model, on the rank that writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model


def rank_save(path: str, root: str) -> tuple[int, int, int]:
    """Return how many values this rank received in gathers of a save, how many parameters the model has, and how many
    values the save received on devices."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    session.train(1, 1)
    received, in_device_groups = count_received(layout)
    checkpoint.begin_save(
        root, 1, chunks=session.chunks, optimizer=session.optimizer, layout=layout, trainer_state={}
    ).finish()
    size = sum(parameter.numel() for parameter in session.chunks[0].parameters())
    close(layout)
    return sum(received), size, sum(in_device_groups)


def count_received(layout: Any) -> tuple[list[int], list[int]]:
    """Count the fp32 values that gathers bring to this rank, and those that come over the group of device tensors."""
    received: list[int] = []
    in_device_groups: list[int] = []
    all_gather, gather = dist.all_gather, dist.gather

    def note(pieces: Any, group: Any) -> None:
        values = sum(piece.numel() for piece in pieces or () if piece.dtype is torch.float32)
        received.append(values)
        if group is layout.dp_group:
            in_device_groups.append(values)

    def noted_all_gather(pieces: Any, piece: Any, group: Any = None, **options: Any) -> Any:
        note(pieces, group)
        return all_gather(pieces, piece, group, **options)

    def noted_gather(piece: Any, pieces: Any = None, first: Any = None, group: Any = None, **options: Any) -> Any:
        note(pieces, group)
        return gather(piece, pieces, first, group, **options)

    dist.all_gather, dist.gather = noted_all_gather, noted_gather  # type: ignore[assignment]
    return received, in_device_groups


def test_only_the_first_replica_gathers_the_state_of_the_optimizer_and_in_host_memory(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    (first, size, on_device), (second, _, also_on_device) = run_ranks(2, rank_save, path, str(tmp_path / "root"))
    weights_and_two_moments = 3 * size
    assert weights_and_two_moments <= first <= weights_and_two_moments * 1.1
    assert second == 0
    assert (on_device, also_on_device) == (0, 0)
