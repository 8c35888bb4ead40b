"""The choice between GPUs and CPUs. Only this module, ``streams`` and ``mcore.compat`` use torch's parts for GPUs."""

from __future__ import annotations

import datetime
import functools
import os
import resource

import torch
import torch.distributed as dist

from megatron_dypo.supported import is_at_least


@functools.cache
def device_kind() -> str:
    """Return ``"cuda"`` if torch sees a GPU, else ``"cpu"``. ``CUDA_VISIBLE_DEVICES=""`` forces the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu() -> bool:
    """Return whether the policy trains on a GPU."""
    return device_kind() == "cuda"


def num_gpus() -> int:
    """Return how many GPUs this process sees; 0 on a CPU."""
    return torch.cuda.device_count() if on_gpu() else 0


def device() -> torch.device:
    """Return this rank's device: its current GPU (see :func:`bind`), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend of device tensors: ``nccl`` or ``gloo``."""
    return "nccl" if on_gpu() else "gloo"


def update_backend(name: str, torch_version: str = torch.__version__) -> str:
    """Return how this torch calls the backend that torch below 2.15 calls ``name``.

    Since 2.15 ``nccl`` names another backend (``ProcessGroupNCCL2``), and a broadcast between the two hangs. The
    servers of :data:`megatron_dypo.supported.RANGES` have a torch below 2.15 (SGLang 0.5.23 pins 2.14.1).
    """
    return "nccl-legacy" if name == "nccl" and is_at_least(torch_version, "2.15") else name


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
    torch.cuda.set_device(local_rank)


def empty_cache() -> None:
    """Give the memory that torch keeps for later back to the GPU, for another process."""
    if on_gpu():
        torch.cuda.empty_cache()


def world_size() -> int:
    """Return how many ranks :func:`init_process_group` will join: torchrun's ``WORLD_SIZE``; 1 without ``RANK``."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def init_process_group(timeout: datetime.timedelta) -> None:
    """Join the default process group: torchrun's, or a group of one when ``RANK`` is not in the environment."""
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def synchronize() -> None:
    """Wait until the GPU has done its work, so that a wall clock measures it. A CPU has nothing to wait for."""
    if on_gpu():
        torch.cuda.synchronize()


def synchronize_stream() -> None:
    """Wait until the GPU has done the work of the current stream; reductions on other streams may go on."""
    if on_gpu():
        torch.cuda.current_stream().synchronize()


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


def gpus() -> tuple[str, ...]:
    """Return the vendor's name and the compute capability of each GPU that torch sees."""
    seen = range(torch.cuda.device_count() if on_gpu() else 0)
    return tuple(
        f"{torch.cuda.get_device_name(gpu)} ({'.'.join(map(str, torch.cuda.get_device_capability(gpu)))})"
        for gpu in seen
    )


def profiled_activities() -> list[torch.profiler.ProfilerActivity]:
    """Return what torch's profiler records here: the CPU, and the GPU if there is one."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if on_gpu() else [activity.CPU]


def gpu_spans(profile: torch.profiler.profile) -> list[tuple[str, float, float]]:
    """Return (name, beginning, end) of each kernel and copy that a profile saw on the GPU, in microseconds."""
    on_device = torch.autograd.DeviceType.CUDA
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == on_device and not event.is_user_annotation
    ]


def is_communication(kernel: str) -> bool:
    """Return whether a kernel of this name sends or receives: NCCL's, or DeepEP's."""
    return kernel.startswith("nccl") or "deep_ep" in kernel


def begin_capture() -> None:
    """Tell Nsight Systems that its capture begins; do nothing on a CPU."""
    if on_gpu():
        torch.cuda.profiler.start()


def end_capture() -> None:
    """Tell Nsight Systems that its capture ends; do nothing on a CPU."""
    if on_gpu():
        torch.cuda.profiler.stop()


def push_range(name: str) -> None:
    """Begin an NVTX range; do nothing on a CPU."""
    if on_gpu():
        torch.cuda.nvtx.range_push(name)


def pop_range() -> None:
    """End the NVTX range that began last; do nothing on a CPU."""
    if on_gpu():
        torch.cuda.nvtx.range_pop()


def reset_peak_memory() -> None:
    """Start a new maximum for :func:`peak_memory_gib` on a GPU; a CPU process keeps its maximum."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Return the largest memory of this process so far: on its GPU, or resident on a CPU machine."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
