"""Commands that never outlive this program: if it is asked to stop or is killed, they end too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_dypo.ending import Cause
from megatron_dypo.processes.children import program

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 900.0
"""Seconds between SIGTERM and SIGKILL. A run that is asked to stop saves a checkpoint."""


def start(command: Sequence[str], grace_s: float, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a command under a guard, which ends it if this process is killed."""
    guard = program("megatron_dypo.processes.guard:main", os.getpid(), grace_s, *command)
    # In a session of its own, so that Ctrl-C reaches this process alone, which then stops the command in order.
    return subprocess.Popen(
        guard, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


def run_to_the_end(command: Sequence[str]) -> int:
    """Run a command and return its exit status.

    SIGTERM and Ctrl-C ask the command to stop, and end this program with the status of a run that was stopped.
    """
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        process.terminate()

    process = start(command, GRACE_S)
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        print("stopped on request; run the same command again to go on", file=sys.stderr)
        sys.exit(Cause.STOPPED.status)
    return status
