"""Process groups outside the default one, which a refit makes with SGLang's processes."""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist

from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.parallel import device
from megatron_dypo.parallel.environment import NO_WATCHDOG, with_variables

NEW_GROUP = PrivateName(
    package="torch",
    module="torch.distributed.distributed_c10d",
    name="_new_process_group_helper",
    source="pytorch/pytorch v2.13.0 torch/distributed/distributed_c10d.py:1984",
    oldest="2.6",
    takes=("group_size", "group_rank", "global_ranks_in_group", "backend", "store", "group_name", "timeout"),
)
"""Makes a group whose ranks are not those of the default group. SGLang uses the same function
(``sglang/srt/utils/common.py``, ``init_custom_process_group``), and both ends must match."""

WORLD = PrivateName(
    package="torch",
    module="torch.distributed.distributed_c10d",
    name="_world",
    source="pytorch/pytorch v2.13.0 torch/distributed/distributed_c10d.py:726 (pg_group_ranks)",
    oldest="2.0",
)
"""Holds ``pg_group_ranks``, with which collectives translate a global rank to a rank of a group."""


def join_as_rank_0(store: dist.Store, size: int, name: str, backend: str, timeout: datetime.timedelta) -> Any:
    """Join a group outside the default one as rank 0, and wait for the other ranks, which SGLang makes.

    Args:
        backend: its name for the servers, whose torch is below 2.15.

    Raises:
        RuntimeError: a rank did not join within ``timeout``, or torch lacks the private names.
    """
    with with_variables(NO_WATCHDOG):
        group, _ = NEW_GROUP.get()(
            size,
            0,
            [],
            dist.Backend(device.update_backend(backend)),
            dist.PrefixStore(name, store),
            group_name=name,
            backend_options=None,
            timeout=timeout,
        )
    WORLD.get().pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def separate_group(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, *, ctas: int) -> Any:
    """Make a group outside the default one and its registries: of NCCL, or (in tests, without a GPU) of gloo. Dropping
    the last reference closes it.

    Like ``torch.distributed.ProcessGroup``, the group has ``send`` and ``recv`` of lists of tensors. On a GPU, wait for
    them by :func:`megatron_dypo.parallel.streams.finish`.

    Args:
        ctas: most thread blocks of a GPU that one message occupies; at least one.
    """
    if device.on_gpu():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout  # pytorch/pytorch v2.13.0 torch/csrc/distributed/c10d/init.cpp: no public name
        options.config.max_ctas = max(1, ctas)
        with with_variables(NO_WATCHDOG):
            return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def abort(group: Any) -> None:
    """End the operations of a group of NCCL that are under way: its kernels would wait indefinitely."""
    if group is not None and device.on_gpu():
        group.abort()
