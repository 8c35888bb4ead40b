"""Commands of the GPU check, each under a guard that ends all of its processes, and within a time limit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_dypo.processes.children import program

ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 20.0


class JobError(RuntimeError):
    """A command failed or was too slow; the message names its log."""


def megatron_dypo(*arguments: str) -> list[str]:
    """Return a ``megatron-dypo`` command."""
    return [sys.executable, "-m", "megatron_dypo.cli", *arguments]


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command inside the block; at its end every process of the command has ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    guarded = program("megatron_dypo.processes.guard:main", os.getpid(), _GRACE_S, *command)
    with log.open("wb") as output:
        process = subprocess.Popen(
            guarded,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def run(command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end.

    Raises:
        JobError: it failed, or has not ended after ``limit_s`` seconds.
    """
    with started(command, log, environment) as process:
        wait(process, log, limit_s)


def wait(process: subprocess.Popen[bytes], log: Path, limit_s: float) -> None:
    """Wait for the end of a command. Raises JobError as :func:`run` does."""
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise JobError(f"not done after {limit_s:.0f} s; see {log}") from None
    if status:
        raise _failed(status, log)


def wait_for_line(process: subprocess.Popen[bytes], log: Path, text: str, limit_s: float) -> None:
    """Wait until a command that goes on has written this text.

    Raises:
        JobError: it ended first, or has not written it after ``limit_s`` seconds.
    """
    end = time.monotonic() + limit_s
    while text not in _read(log):
        status = process.poll()
        if status is not None:
            raise _failed(status, log)
        if time.monotonic() > end:
            raise JobError(f"no {text!r} after {limit_s:.0f} s; see {log}")
        time.sleep(0.1)


def _failed(status: int, log: Path) -> JobError:
    lines = _read(log).strip().splitlines()
    return JobError(f"status {status}: {lines[-1] if lines else 'no output'}; see {log}")


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
