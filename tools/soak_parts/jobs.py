"""A run under faults as a Slurm job, all of whose nodes are on this host."""

from __future__ import annotations

import contextlib
import random
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_dypo.ending import Cause
from tools.soak_parts.faults import DAMAGE, FAULTS, Fault, flip_a_bit
from tools.soak_parts.processes import RunProcesses, by_role

_SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "dypo_70b.sh"
_REQUEUE_S = 300.0
"""Longest time from a request to stop until the job is back in the queue."""


class SlurmJob:
    """How a soak starts the job of a run, finds its processes, and stops it."""

    def __init__(self, config: Path, overrides: Sequence[str], run_dir: Path, options: str) -> None:
        """``options`` are those of sbatch. The settings of the job are taken from the environment (slurm/common.sh)."""
        self.name = f"soak-{run_dir.name}"
        named = ["sbatch", "--wait", f"--job-name={self.name}", f"--export=ALL,CONFIG={config.resolve()}"]
        output = f"--output={run_dir.resolve()}.job.log"
        self.command = [*named, output, *shlex.split(options), str(_SCRIPT), *overrides]
        self.damaged = set[str]()
        self._run_dir = run_dir
        self.faults: Mapping[str, Fault] = {
            **{name: replace(fault, outcome="goes on") for name, fault in FAULTS.items()},
            "ask to stop": Fault(outcome="goes on", do=lambda run, rng, stop: self._interrupt(stop)),
            DAMAGE: Fault(outcome="goes on", do=lambda run, rng, stop: self._damage(run, rng)),
        }

    def find(self, command: psutil.Process) -> RunProcesses:
        """Return the job's processes. ``command`` is sbatch, which waits for the job."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_NAME") == self.name:
                    found.append(process)
        return by_role(command, found)

    def stop(self, command: psutil.Popen) -> int:
        """Let the job save and be requeued, and cancel it in the queue."""
        number = self._requeue(threading.Event())
        _call("scancel", f"--name={self.name}")
        status = int(command.wait())
        return Cause.STOPPED.status if number else status

    def _interrupt(self, stop: threading.Event) -> str | None:
        """Have the job requeued. It need not wait for as long as Slurm would let it."""
        number = self._requeue(stop)
        if number is None:
            return None
        stop.wait(2.0)  # within the second of the requeue nodes refuse the job's credential
        _call("scontrol", "update", f"JobId={number}", "StartTime=now+3seconds")
        return f"SIGUSR1 to job {number}, which was requeued"

    def _requeue(self, stop: threading.Event) -> str | None:
        """Tell the job that its time is nearly over; return its number once it is back in the queue."""
        if _call("scancel", "--batch", "--signal=USR1", f"--name={self.name}") is None:
            return None
        end = time.monotonic() + _REQUEUE_S
        while time.monotonic() < end and not stop.wait(1.0):
            queued = _call("squeue", "--noheader", f"--name={self.name}", "--format=%A %T") or ""
            number, _, state = queued.partition(" ")
            if state == "PENDING":
                return number
        return None

    def _damage(self, run: RunProcesses, rng: random.Random) -> str | None:
        """Flip a bit of the newest checkpoint, and kill a rank, so that the checkpoint is read."""
        words = flip_a_bit(self._run_dir, rng, self.damaged)
        return words and f"{words}; then {FAULTS['kill a rank'].do(run, rng, threading.Event())}"


def _call(*command: str) -> str | None:
    """Return what a command of Slurm prints; None if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()
