"""Exchange of small Python values (texts and a few numbers, not tensors) between ranks over torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_dypo.parallel.device import device

T = TypeVar("T")


def any_rank(mine: bool) -> bool:
    """Return whether ``mine`` is true on at least one rank. Collective over the world."""
    flag = torch.tensor([float(mine)], device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def gather_floats(mine: Sequence[float]) -> list[list[float]]:
    """Return the numbers of every rank of the world, in rank order. Collective; each rank passes equally many."""
    own = torch.tensor(mine, dtype=torch.float64, device=device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    values: list[list[float]] = torch.stack(found).tolist()
    return values


def gather_world(value: T) -> list[T]:
    """Return the ``value`` of every rank of the world, in rank order. Slow on GPUs: use it on rare occasions."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the ``value`` of every rank of ``group``, in rank order. Collective over the group."""
    if group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T, group: dist.ProcessGroup) -> T:
    """Return rank 0's ``value`` on every rank of ``group``; the others' are ignored. Collective over the group."""
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(cast(list[Any], box), group_src=0, group=group)
    return box[0]
