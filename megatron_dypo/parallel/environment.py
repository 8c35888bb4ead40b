"""Variables that CUDA, NCCL and torch read in a process of the run when they are first used. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from megatron_dypo.fs import private_folder

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables with the settings of torch's allocator, the older name first."""
EXPANDABLE = "expandable_segments"
"""The allocator's setting for segments that grow, which other processes cannot open."""
NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""Variables with which a process group leaves errors to those who use it. By default a thread of ProcessGroupNCCL ends
the process if an operation fails or is late. Each group reads them when it is made."""


@contextlib.contextmanager
def with_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process inside the block, and restore what they were after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def prepare_rank(environment: MutableMapping[str, str]) -> None:
    """Set what a rank needs, before it asks for a GPU; values that are set stay."""
    environment.setdefault("OMP_NUM_THREADS", "1")
    # Tensor and context parallelism overlap communication with GEMMs in the order of launch.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # SGLang turns both off in its processes, and the two ends of a group that carries weights must agree.
    environment.setdefault("NCCL_CUMEM_ENABLE", "0")
    environment.setdefault("NCCL_NVLS_ENABLE", "0")


def set_kernel_cache(environment: MutableMapping[str, str]) -> None:
    """Have torch keep compiled kernels in a folder of this user alone; a value that is set stays.

    torch's own choice is ``/tmp/torchinductor_USER``. It loads the code that lies there, whoever made the folder.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in environment:
        cache = private_folder(Path(tempfile.gettempdir()) / f"dypo-cache-{os.getuid()}")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")


def without_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Remove a setting of the trainer that SGLang's memory saver refuses; other settings of the allocator stay."""
    for name in ALLOCATOR:
        if name in environment:
            settings = environment[name].split(",")
            kept = ",".join(one for one in settings if one.partition(":")[0].strip() != EXPANDABLE)
            if kept:
                environment[name] = kept
            else:
                del environment[name]
