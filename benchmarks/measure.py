"""Time and peak memory of one process: what the benchmarks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LEAN_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
"""glibc gives freed blocks of 1 MiB and more back at once, so that resident memory is what is in use."""


def run_ranks(script: str, arguments: list[str], *, ranks: int = 1, lean: bool = False) -> Any:
    """Run ``script`` in a process of its own, or in ``ranks`` of them under torchrun, one thread each.

    Returns:
        The JSON object on the last line of their output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {
        **os.environ, **(LEAN_ALLOCATOR if lean else {}), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, *launcher, script, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def resident_bytes() -> int:
    """Memory of this process that is resident now (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the process began or :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each variant by round: on the wall's clock, and of this process's time on processors.

    Rounds go through the variants in turn, every other one backwards, so that a change of the machine's load hits all.
    """
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for name in reversed(list(variants)) if index % 2 else variants:
            start, start_cpu = time.perf_counter(), time.process_time()
            variants[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return wall, cpu


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status: no {field}; these measurements need Linux")
