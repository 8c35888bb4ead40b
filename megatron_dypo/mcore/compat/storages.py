"""A GPU's memory, shared between processes of one host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.parallel.environment import ALLOCATOR, EXPANDABLE

SHARE_STORAGE = PrivateName(
    package="torch",
    module="torch",
    name="UntypedStorage._share_cuda_",
    source="pytorch/pytorch v2.13.0 torch/multiprocessing/reductions.py:351",
    oldest="2.0",
)
"""Returns the GPU's number and the handle of a storage for another process."""

OPEN_STORAGE = PrivateName(
    package="torch",
    module="torch",
    name="UntypedStorage._new_shared_cuda",
    source="pytorch/pytorch v2.13.0 torch/multiprocessing/reductions.py:179",
    oldest="2.0",
)
"""Opens what ``_share_cuda_`` returned."""

SET_ALLOCATOR = PrivateName(
    package="torch",
    module="torch.cuda.memory",
    name="_set_allocator_settings",
    source="pytorch/pytorch v2.13.0 torch/cuda/memory.py:1195",
    oldest="2.2",
)
"""Changes settings of the allocator of PYTORCH_CUDA_ALLOC_CONF while the process runs."""


@contextlib.contextmanager
def shareable_memory() -> Iterator[object]:
    """Allocate GPU memory inside the block so that :func:`share_storage` can share it.

    The handle of a segment that grows (``expandable_segments:True``) needs the right to trace this process, which Linux
    refuses by default. Keep the yielded object as long as the memory.
    """
    pool = torch.cuda.MemPool()
    grow = any(f"{EXPANDABLE}:True" in os.environ.get(name, "").replace(" ", "") for name in ALLOCATOR)
    if grow:
        SET_ALLOCATOR.get()(f"{EXPANDABLE}:False")
    try:
        with torch.cuda.use_mem_pool(pool):
            yield pool
    finally:
        if grow:
            SET_ALLOCATOR.get()(f"{EXPANDABLE}:True")


def share_storage(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Return a handle of a GPU's memory, for :func:`open_storage` in another process on this host.

    The handle has the GPU's UUID, since processes may number GPUs differently. The memory must stay allocated while the
    other process uses it.
    """
    uuid = str(torch.cuda.get_device_properties(storage.device).uuid)
    return uuid, *SHARE_STORAGE.get()(storage)[1:]


def open_storage(handle: tuple[Any, ...]) -> torch.UntypedStorage:
    """Open the memory that another process shared.

    Raises:
        ValueError: this process does not see that GPU.
    """
    uuid, *rest = handle
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ValueError(f"GPU {uuid} of the trainer is none of this server's ({', '.join(seen)}): use transport=p2p")
    opened: torch.UntypedStorage = OPEN_STORAGE.get()(seen.index(uuid), *rest)
    return opened
