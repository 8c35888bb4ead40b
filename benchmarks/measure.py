"""Functions that the benchmarks share: measure time and peak memory, and print where and how a measurement was made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LEAN_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
"""Settings with which glibc returns freed blocks of 1 MiB and more at once: resident memory is then memory in use."""


def run_ranks(script: str, arguments: list[str], *, ranks: int = 1, lean: bool = False) -> Any:
    """Run ``script`` in a process of its own, or in ``ranks`` processes under torchrun, with one thread each.

    Returns:
        The JSON object on the last line of the output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {
        **os.environ, **(LEAN_ALLOCATOR if lean else {}), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, *launcher, script, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def print_header() -> None:
    """Print the first lines of a results file: the time, the commit, the machine and the command of the measurement."""
    moment = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    print(f"# {moment}, commit {_commit()}, Python {platform.python_version()}, {packages}")
    print(f"# processor: {_processor()}, {cores} of {os.cpu_count()} cores usable, {memory:.0f} GiB of memory")
    print(f"# load at the start: {_load()}")
    print("$ python " + shlex.join([str(_from_root(Path(sys.argv[0]))), *sys.argv[1:]]), flush=True)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the machine's load at the end, and then the result, which is the last line."""
    print(f"# load at the end: {_load()}")
    print(json.dumps(result), flush=True)


def _load() -> str:
    return "{:.1f} over 1 minute, {:.1f} over 5, {:.1f} over 15".format(*os.getloadavg())


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Return the commit that is checked out, and whether files differ from it; "unknown" outside a clone."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return found.stdout.strip() + (" with changes" if changed else "")


def _from_root(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def resident_bytes() -> int:
    """Return the resident memory of this process now (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident memory since the process began, or since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of each variant by round: of the wall clock, and of this process's processor time.

    Each round calls every variant once, every other round in reverse order: a change of the machine's load affects all.
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
    for line in _lines("/proc/self/status"):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status: no {field}; these measurements need Linux")
