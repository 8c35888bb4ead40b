"""The choice between GPUs and CPUs, made in one place: the words cuda and nccl appear in no other file."""

from __future__ import annotations

import datetime
import functools
import os
import resource

import torch
import torch.distributed as dist


@functools.cache
def device_kind() -> str:
    """``"cuda"`` where torch sees a GPU, else ``"cpu"``; ``CUDA_VISIBLE_DEVICES=""`` forces the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu() -> bool:
    """True where the policy trains on a GPU."""
    return device_kind() == "cuda"


def device() -> torch.device:
    """This rank's device: its current GPU (see :func:`bind`), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of device tensors: ``nccl`` or ``gloo``."""
    return "nccl" if on_gpu() else "gloo"


def bind() -> None:
    """Give this rank its GPU, by ``LOCAL_RANK``; on a CPU there is nothing to give.

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


def init_process_group(timeout: datetime.timedelta) -> None:
    """Join the default process group: torchrun's, or a group of one when ``RANK`` is not in the environment."""
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def synchronize() -> None:
    """Wait for the device, so that a wall clock measures what ran; the CPU has nothing to wait for."""
    if on_gpu():
        torch.cuda.synchronize()


def get_rng_state() -> torch.Tensor:
    """The GPU's RNG state, as a CPU tensor of bytes."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what :func:`get_rng_state` gave."""
    torch.cuda.set_rng_state(state)


def memory_bytes() -> int | None:
    """Memory of this rank's GPU; None on a CPU, whose memory is shared with whatever else runs there."""
    return torch.cuda.get_device_properties(device()).total_memory if on_gpu() else None


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU, e.g. (9, 0) for Hopper; None on a CPU."""
    return torch.cuda.get_device_capability(device()) if on_gpu() else None


def toolkit_version() -> tuple[int, ...]:
    """Of the CUDA toolkit that torch was built with; empty without one."""
    return tuple(int(part) for part in torch.version.cuda.split(".")) if torch.version.cuda else ()


def device_name() -> str:
    """As the vendor calls this rank's GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device()) if on_gpu() else "CPU"


def reset_peak_memory() -> None:
    """Start :func:`peak_memory_gib` anew on a GPU; a CPU process keeps its maximum."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """The largest memory of this process so far: of its GPU, or resident on a CPU machine."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
