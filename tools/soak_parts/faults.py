"""The faults of a soak: each is done to a run that trains, or to its last checkpoint between two starts."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, find_latest, whole_folders
from tools.soak_parts.processes import RunProcesses

Outcome = Literal["goes on", "ends", "stops"]
"""What follows: the same start goes on; it ends with an error; or it saves and ends on request."""
LONGEST_STOP_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault."""

    outcome: Outcome
    do: Callable[[RunProcesses, random.Random, threading.Event], str | None]
    """Do it; return the words for the record, None if the run has no such target now. The event ends a pause early."""


def _one(targets: tuple[psutil.Process, ...], rng: random.Random) -> psutil.Process | None:
    return rng.choice(targets) if targets else None


def _send(process: psutil.Process | None, number: signal.Signals, name: str) -> str | None:
    if process is None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return f"{number.name} to {name}, process {process.pid}"
    return None


def _pause(process: psutil.Process | None, name: str, rng: random.Random, stop: threading.Event) -> str | None:
    seconds = rng.uniform(2.0, LONGEST_STOP_S)
    if _send(process, signal.SIGSTOP, name) is None or process is None:
        return None
    stop.wait(seconds)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)
    return f"SIGSTOP for {seconds:.0f} s to {name}, process {process.pid}"


FAULTS: Mapping[str, Fault] = {
    "kill a rank": Fault(
        outcome="ends", do=lambda run, rng, stop: _send(_one(run.ranks, rng), signal.SIGKILL, "a rank")
    ),
    "kill the launcher": Fault(
        outcome="ends",
        do=lambda run, rng, stop: _send(run.launcher, signal.SIGKILL, "the launcher"),
    ),
    "kill a server": Fault(
        outcome="goes on", do=lambda run, rng, stop: _send(_one(run.servers, rng), signal.SIGKILL, "a server")
    ),
    "kill a verifier": Fault(
        outcome="goes on", do=lambda run, rng, stop: _send(_one(run.verifiers, rng), signal.SIGKILL, "a verifier")
    ),
    "stop a server": Fault(
        outcome="goes on", do=lambda run, rng, stop: _pause(_one(run.servers, rng), "a server", rng, stop)
    ),
    "stop a rank": Fault(
        outcome="goes on", do=lambda run, rng, stop: _pause(_one(run.ranks, rng), "a rank", rng, stop)
    ),
    "ask to stop": Fault(outcome="stops", do=lambda run, rng, stop: _send(run.command, signal.SIGTERM, "the command")),
}
"""Name → fault, each as likely as another. After a fault that ends the start, it is started again."""

DAMAGE = "damage a checkpoint"
"""A fault between two starts; see :func:`flip_a_bit`."""


def flip_a_bit(run_dir: Path, rng: random.Random, damaged: set[str]) -> str | None:
    """Flip one bit of a file of the newest checkpoint; None if there is no whole older one to go back to.

    Args:
        damaged: names of the checkpoints that have been damaged; the newest joins them.
    """
    folder = run_dir / CHECKPOINTS
    latest = find_latest(folder)
    whole = {path.name for path in whole_folders(folder)} - damaged
    if latest is None or latest.name not in whole or len(whole) < 2:
        return None
    damaged.add(latest.name)
    file = rng.choice(sorted(path for path in latest.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(file.read_bytes())
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return f"bit {place % 8} of byte {place // 8} of {file.relative_to(folder)}"
