"""Decisions that every rank has to take alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dypo.parallel.device import device


def any_rank(mine: bool) -> bool:
    """Whether ``mine`` is true on any rank, on all of them. Collective over the world."""
    flag = torch.tensor([float(mine)], device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def gather_world(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order; for a word or a few numbers a rank, on rare occasions."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
