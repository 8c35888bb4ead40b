"""The choice between GPUs and CPUs, made in one place: the words cuda and nccl appear in no other file."""

from __future__ import annotations

import datetime
import functools
import os
import resource
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def device_kind() -> str:
    """Return ``"cuda"`` where torch sees a GPU, else ``"cpu"``; ``CUDA_VISIBLE_DEVICES=""`` forces the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu() -> bool:
    """Return whether the policy trains on a GPU."""
    return device_kind() == "cuda"


def device() -> torch.device:
    """Return this rank's device: its current GPU (see :func:`bind`), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend of device tensors: ``nccl`` or ``gloo``."""
    return "nccl" if on_gpu() else "gloo"


def bind() -> None:
    """Give this rank the GPU of its ``LOCAL_RANK``; do nothing on a CPU.

    Raises:
        ValueError: more ranks than GPUs on this host.
    """
    if not on_gpu():
        return
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(f"LOCAL_RANK={local_rank}: this host has {num_gpus} GPUs; start one rank for each GPU")
    # Before the first kernel: tensor parallelism overlaps communication with GEMMs in the order of launch.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)


def world_size() -> int:
    """Return how many ranks :func:`init_process_group` will join: torchrun's ``WORLD_SIZE``; 1 without ``RANK``."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def init_process_group(timeout: datetime.timedelta) -> None:
    """Join the default process group: torchrun's, or a group of one when ``RANK`` is not in the environment."""
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def separate_group(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Make a group outside the default one and its registries. Dropping the last reference to it closes it.

    Has ``send`` and ``recv`` of lists of tensors, as ``torch.distributed.ProcessGroup`` does.
    """
    if on_gpu():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def share_storage(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Return a handle of GPU memory, for :func:`open_storage` in another process on this host.

    The GPU is named by its UUID: processes may number GPUs differently. The memory must outlive its use there.
    """
    uuid = str(torch.cuda.get_device_properties(storage.device).uuid)
    return uuid, *storage._share_cuda_()[1:]


def open_storage(handle: tuple[Any, ...]) -> torch.UntypedStorage:
    """Open the memory that another process shared by :func:`share_storage`.

    Raises:
        ValueError: this process does not see that GPU.
    """
    uuid, *rest = handle
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ValueError(f"GPU {uuid} of the trainer is none of this server's ({', '.join(seen)}): use transport=p2p")
    return torch.UntypedStorage._new_shared_cuda(seen.index(uuid), *rest)


def synchronize() -> None:
    """Wait until the GPU has done its work, so that a wall clock measures it. A CPU has nothing to wait for."""
    if on_gpu():
        torch.cuda.synchronize()


def get_rng_state() -> torch.Tensor:
    """Return the GPU's RNG state, as a CPU tensor of bytes."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore a state that :func:`get_rng_state` returned."""
    torch.cuda.set_rng_state(state)


def memory_bytes() -> int | None:
    """Return the memory of this rank's GPU; None on a CPU, which shares its memory with other programs."""
    return torch.cuda.get_device_properties(device()).total_memory if on_gpu() else None


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of this rank's GPU, e.g. (9, 0) for Hopper; None on a CPU."""
    return torch.cuda.get_device_capability(device()) if on_gpu() else None


def toolkit_version() -> tuple[int, ...]:
    """Return the version of the CUDA toolkit that torch was built with; empty without one."""
    return tuple(int(part) for part in torch.version.cuda.split(".")) if torch.version.cuda else ()


def device_name() -> str:
    """Return the vendor's name of this rank's GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device()) if on_gpu() else "CPU"


def reset_peak_memory() -> None:
    """Start a new maximum for :func:`peak_memory_gib` on a GPU; a CPU process keeps its maximum."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Return the largest memory of this process so far: on its GPU, or resident on a CPU machine."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
