"""One command of a cell. It runs under a guard, so that it never outlives the comparison, and its output goes to a
file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.processes.children import end_of, program
from megatron_dypo.processes.stop_requests import STOP

_LOOK_EVERY_S = 2.0
"""Seconds between two looks at the progress of a run, which it only writes to a file."""
_TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class CommandEnd:
    """How a command ended."""

    status: int
    """Exit status; 128 + n after signal n."""
    words: str
    """Its error, else the last line that it printed."""


def run_command(command: Sequence[str], log: Path, *, grace_s: float, on_look: Callable[[], None]) -> CommandEnd:
    """Run a command to its end.

    A request to stop this process is passed on to the command's processes as SIGTERM; after ``grace_s`` seconds they
    are killed. The same happens if this process is killed.

    Args:
        log: file that gets the command's output, after what is there.
        on_look: called now and then while the command runs.
    """
    guarded = program("megatron_dypo.processes.guard:main", os.getpid(), grace_s, *command, isolated=True)
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            guarded,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the command in order
        )
    with STOP.calling(process.terminate), end_of(process) as ended:
        while not ended.poll(_LOOK_EVERY_S):
            on_look()
    on_look()
    status = process.wait()
    return CommandEnd(status=status if status >= 0 else 128 - status, words=_last_words(log, start))


def _last_words(log: Path, start: int) -> str:
    """Return the last error in the part of a log from ``start``, else its last line, without our program's name."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("megatron-dypo: error: ")]
    words = (errors or lines or ["it printed nothing"])[-1]
    return words.removeprefix("megatron-dypo: error: ")
