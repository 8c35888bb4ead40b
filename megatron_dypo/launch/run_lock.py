"""A lock on a run folder: one run at a time uses it, also if several hosts share the file system.

The lock is the file ``run.lock``, which names its holder. It is made by ``link``, at which only one process can
succeed, also over NFS. The holder touches it every :data:`BEAT_S` seconds. The folder is free when its holder has
removed the file or is certainly gone: it was a process of this machine that no longer runs; it was an earlier attempt
of the same Slurm job; or it runs on another machine and has not touched the file for :data:`STALE_S` seconds of the
file server's clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.fs import make_exclusively, passing
from megatron_dypo.json_text import parse_json
from megatron_dypo.processes.identity import ProcessIdentity, own_identity

NAME = "run.lock"
TRAINER_START_VARIABLE = "DYPO_TRAINER_START"
"""Environment variable: the number of starts of the trainer in this attempt of the job; slurm/common.sh sets it."""
BEAT_S = 30.0
STALE_S = 180.0
"""Longer than a beat plus the minute for which an NFS client may cache an old time of a file."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lock file."""

    token: str
    """Distinguishes this lock from every other lock."""
    process: ProcessIdentity
    since: str
    job: str
    """Slurm's job, its attempt and the start of the trainer in it, ``1234.2.0``; empty outside of Slurm."""

    def is_before(self, job: str) -> bool:
        """Return whether Slurm has ended the holder's attempt or step and then started that of ``job``."""
        (mine, *start), (theirs, *earlier) = job.split("."), self.job.split(".")
        return bool(job) and mine == theirs and [int(number) for number in earlier] < [int(number) for number in start]


class RunLock:
    """The lock of one run folder, held from :meth:`acquire` to :meth:`release`."""

    def __init__(self, run_dir: Path, *, on_loss: Callable[[str], None], beat_s: float = BEAT_S) -> None:
        """Make a lock that nobody holds yet.

        Args:
            on_loss: called from a thread if another process has taken the lock over, because this one slept for
                minutes. From then on two runs write to the folder.
        """
        self._path = run_dir / NAME
        self._on_loss, self._beat_s = on_loss, beat_s
        self._token = uuid.uuid4().hex
        self._is_released = threading.Event()
        self._holder = Holder(token=self._token, process=own_identity(), since=_now(), job=_slurm_job())

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunEnded: another run holds it (:data:`Cause.IN_USE`); the message names host, process and since when.
        """
        while not self._make():
            self._remove_left_behind(require_free(self._path.parent))
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Remove the lock file, if it is still this lock's."""
        self._is_released.set()
        found = read_holder(self._path.parent)
        if found is not None and found.token == self._token:
            self._path.unlink(missing_ok=True)

    def _make(self) -> bool:
        """Make the lock file; return False if there is one."""
        return make_exclusively(self._path, json.dumps(asdict(self._holder)))

    def _remove_left_behind(self, gone: Holder | None) -> None:
        """Remove the lock of ``gone``, or an unreadable lock, if it still exists.

        If several processes find it free, only the one that makes the claim file for this very lock may remove it. So
        none removes the new lock of a faster one.
        """
        claim = self._path.with_name(f"{NAME}.{gone.token if gone else 'unreadable'}.claim")
        if not make_exclusively(claim, ""):
            if (_age(claim) or 0.0) > STALE_S:  # the process that made it died in between
                claim.unlink(missing_ok=True)
            return
        try:
            is_still_there = read_holder(self._path.parent) == gone
            # An unreadable lock may still be on its way to disk. Only its age shows that nobody is writing it.
            if is_still_there and (gone is not None or (_age(self._path) or 0.0) >= STALE_S):
                self._path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._is_released.wait(self._beat_s):
            found = read_holder(self._path.parent)
            if self._is_released.is_set():
                return
            if found is not None and found.token != self._token:
                self._on_loss(f"{self._path} was taken over by {_name(found)}")
                return
            with contextlib.suppress(OSError):  # the file server may be away for a moment; then the lock only gets old
                if found is None and not self._path.exists():
                    self._make()  # somebody removed it
                os.utime(self._path)


def require_free(run_dir: Path) -> Holder | None:
    """Return the holder, who is gone, of a lock that is left over; None without a lock or if it cannot be read.

    Raises:
        RunEnded: a run that may be alive holds it (:data:`Cause.IN_USE`).
    """
    path = run_dir / NAME
    if not path.exists():
        return None
    holder = read_holder(run_dir)
    if holder is not None and holder.process.is_on_this_machine():
        if holder.process.is_alive():
            raise RunEnded(Cause.IN_USE, f"run.dir={str(run_dir)!r}: in use by {_name(holder)}")
        return holder
    if holder is not None and holder.is_before(_slurm_job()):
        return holder
    age = _age(path)
    if age is not None and age < STALE_S:
        who = f"in use by {_name(holder)}" if holder else f"{path} is being written"
        raise RunEnded(
            Cause.IN_USE,
            f"run.dir={str(run_dir)!r}: {who}; last sign of life {age:.0f} s ago "
            f"(if that process is gone, the folder is free after {STALE_S:.0f} s without one)",
        )
    return holder


def remove_dead(run_dir: Path) -> None:
    """Remove the lock if its holder was a process of this machine that has ended, so that no run waits for it."""
    holder = read_holder(run_dir)
    if holder is not None and holder.process.is_on_this_machine() and not holder.process.is_alive():
        (run_dir / NAME).unlink(missing_ok=True)


def read_holder(run_dir: Path) -> Holder | None:
    """Read the lock of a run folder; None if there is no lock or it cannot be read."""
    return _parse(run_dir / NAME)


def _parse(path: Path) -> Holder | None:
    try:
        found = parse_json(path.read_text())
        return Holder(**{**found, "process": ProcessIdentity(**found["process"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(holder: Holder) -> str:
    process = holder.process
    job = f", Slurm job {holder.job.rpartition('.')[0]}" if holder.job else ""
    return f"process {process.pid} on {process.host}{job} since {holder.since}"


def _age(path: Path) -> float | None:
    """Return the seconds since ``path`` was touched, by the clock of its file system; None if it is gone."""
    with passing(path.with_name(f"{NAME}.{uuid.uuid4().hex}"), "") as fresh:
        now = fresh.stat().st_mtime
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _slurm_job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    attempt, start = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", TRAINER_START_VARIABLE))
    return f"{job}.{attempt}.{start}" if job else ""


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(sep=" ", timespec="seconds")
