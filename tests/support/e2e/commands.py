"""The package's commands as a user runs them, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_dypo.metrics.records import read_metrics

REPOSITORY = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "megatron_dypo.cli")
DEADLINE_S = 900.0
"""Deadline of a command. It takes less than a minute on an idle machine, and ten times that on a busy, slow one."""


def start(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start ``megatron-dypo`` in a session of its own. Its output is standard output and standard error."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(config: Path, *overrides: str, status: int = 0, deadline_s: float = DEADLINE_S) -> str:
    """Return the output of a run that must end with this status."""
    return finished(start("train", config, *overrides), status, deadline_s)


def finished(process: subprocess.Popen[str], status: int = 0, deadline_s: float = DEADLINE_S) -> str:
    """Return the output of a command that must end with this status; at the deadline it is killed."""
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        raise
    assert process.returncode == status, output
    return output


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait until the condition holds. The command must go on until then; it is killed at the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            _kill(process)
            raise TimeoutError(f"not within {deadline_s:g} s: {process.communicate()[0]}")
        time.sleep(0.01)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a command with its ranks and servers, of which some have a session of their own."""
    for part in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()


def python(*arguments: object, cwd: Path = REPOSITORY, deadline_s: float = DEADLINE_S) -> str:
    """Return what Python with these arguments, which must succeed, writes to its standard output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the records of a run's metrics by step; none before the first is written."""
    path = run_dir / "metrics.jsonl"
    return {int(record["step"]): record for record in read_metrics(path)} if path.is_file() else {}
