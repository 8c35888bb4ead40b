"""Private names of torch and Megatron that we use, and patches of them: all in this file, each with its upstream line.

A private name may change in any release. Each is a :class:`PrivateName`, which says where upstream defines it and from
which version on it is as we use it; ``tests/unit/mcore/test_compat.py`` fails when upstream changes it.

Only torch is imported at the top: SGLang's processes, which have no Megatron, import this file for the refit. Import
Megatron inside the function that needs it.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dypo.parallel import device


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """A name of another package that its authors may change without notice."""

    package: str
    """The distribution that has it, as pip calls it."""
    module: str
    name: str
    """Within the module; dots lead to attributes."""
    source: str
    """Repository, version and line that we read."""
    oldest: str
    """The first version of the package that has the name as we use it."""

    def get(self) -> Any:
        """Return the object of that name.

        Raises:
            RuntimeError: the package is too old, or has no such name (any more).
        """
        version = importlib.metadata.version(self.package)
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part, None)
        if found is None or _numbers(version) < _numbers(self.oldest):
            raise RuntimeError(
                f"{self.package} {version}: {self.module}.{self.name} must be as in {self.oldest} or later "
                f"({self.source}); install a version that megatron-dypo supports"
            )
        return found


NEW_GROUP = PrivateName(
    package="torch",
    module="torch.distributed.distributed_c10d",
    name="_new_process_group_helper",
    source="pytorch/pytorch v2.13.0 torch/distributed/distributed_c10d.py:1984",
    oldest="2.6",
)
"""Makes a group whose ranks are not those of the default group. SGLang joins by it too (``sglang/srt/utils/common.py``,
``init_custom_process_group``), and both ends must be made alike."""

WORLD = PrivateName(
    package="torch",
    module="torch.distributed.distributed_c10d",
    name="_world",
    source="pytorch/pytorch v2.13.0 torch/distributed/distributed_c10d.py:726 (pg_group_ranks)",
    oldest="2.0",
)
"""Holds ``pg_group_ranks``, by which collectives translate a global rank to one of a group."""

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


def join_as_rank_0(store: dist.Store, size: int, name: str, backend: str, timeout: datetime.timedelta) -> Any:
    """Join a group outside the default one as its rank 0, as SGLang makes the other ranks. Waits for all of them.

    Raises:
        RuntimeError: somebody did not come within ``timeout``, or torch lacks the private names.
    """
    group, _ = NEW_GROUP.get()(
        size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=timeout,
    )
    WORLD.get().pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def separate_group(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Make a group outside the default one and its registries: dropping the last reference closes it.

    The group has ``send`` and ``recv`` of lists of tensors, as ``torch.distributed.ProcessGroup`` does.
    """
    if device.on_gpu():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout  # pytorch/pytorch v2.13.0 torch/csrc/distributed/c10d/init.cpp: no public name
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def share_storage(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Return a handle of a GPU's memory, for :func:`open_storage` in another process on this host.

    The GPU is named by its UUID: processes may number GPUs differently. The memory must outlive its use there.
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


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of ``2.13.0+cpu``."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
