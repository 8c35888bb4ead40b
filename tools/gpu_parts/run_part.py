"""Run one measurement of the GPU check in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_ROOT = Path(__file__).resolve().parents[2]


class Part(Protocol):
    """Runs a measurement, as :func:`run_part` does."""

    def __call__(self, spec: Mapping[str, Any], *, ranks: int = 1) -> dict[str, Any]: ...


class PartError(RuntimeError):
    """The failure of a part; the message is the last line that the part wrote."""


def run_part(spec: Mapping[str, Any], *, ranks: int = 1, limit_s: float = 600.0) -> dict[str, Any]:
    """Run a part (``tools/gpu_parts/part.py``) and return its result.

    Args:
        ranks: number of processes, one for each GPU. The result is that of the first.

    Raises:
        PartError: the part failed, or has not ended after ``limit_s`` seconds.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tools.gpu_parts.part", json.dumps(spec)]
    paths = [str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise PartError(f"{spec['what']}: not done after {limit_s:.0f} s") from None
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        sys.stderr.write(done.stderr)
        told = [line for line in done.stderr.splitlines() if "Error: " in line and "ChildFailedError" not in line]
        lines = told or done.stderr.strip().splitlines()
        raise PartError(lines[-1] if lines else f"exit code {done.returncode}")
    seen: dict[str, Any] = json.loads(results[-1])
    return seen
