"""``run.dir/status.json``: whether a run is running, its progress, and how and why it ended.

One attempt (one start of a run, with all its ranks) writes it. The first rank opens it while it holds the run's lock.
Then each process of the attempt may report why the attempt ended, and the first report counts. The file always appears
whole.

The loop calls :func:`report` after each step. Everything else is for :mod:`megatron_dypo.launch.attempt` and the
launcher.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import megatron_dypo
from megatron_dypo.ending import Cause
from megatron_dypo.fs import make_exclusively, replace_file
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.attempts import note
from megatron_dypo.metrics.repeats import warn_often

log = logging.getLogger(__name__)

NAME = "status.json"
BEFORE_FIRST_STEP = "before the first step of this start"
"""Part of the message of an attempt that was stopped during its start."""
_CLAIM = "status.ended"
WRITE_EVERY_S = 1.0
ATTEMPT_VARIABLE = "MEGATRON_DYPO_ATTEMPT"
"""Environment variable of ranks that the launcher started: the name of the attempt, the same on all nodes."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of ``status.json``."""

    state: Literal["running", "ended"] = "running"
    cause: str | None = None
    """Label of a :class:`~megatron_dypo.ending.Cause`; None while the run goes on."""
    status: int | None = None
    """Exit status of the run's processes."""
    requeue: bool | None = None
    """Whether a scheduler should start the same command again on its own."""
    message: str = ""
    what_to_do: str = ""
    step: int = 0
    """Optimizer steps done."""
    first_step: int | None = None
    """Steps done before this attempt; None until the loop's first report."""
    steps: int = 0
    """Steps of the whole run."""
    counts: Mapping[str, int | float] = field(default_factory=dict)
    """Counts of the loop, over the whole attempt."""
    rank: int = 0
    """The rank that wrote this; -1: the launcher."""
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: _now())
    ended: str | None = None
    version: str = field(default_factory=lambda: megatron_dypo.__version__)
    attempt: str = ""

    def who(self) -> str:
        return "the launcher" if self.rank < 0 else f"rank {self.rank}"

    def steps_here(self) -> int | None:
        """Optimizer steps of this attempt; None if the loop did not report them."""
        if self.first_step is None:
            return 0 if BEFORE_FIRST_STEP in self.message else None
        return self.step - self.first_step

    def progress(self) -> str:
        """``12 of 400 steps are done; groups: 48, dropped: 3``; empty before the loop's first report."""
        if self.first_step is None:
            return ""
        counts = ", ".join(f"{name}: {value}" for name, value in self.counts.items())
        return f"{self.step} of {self.steps} steps are done" + (f"; {counts}" if counts else "")


class RunStatus:
    """This process's access to the status file of an attempt."""

    def __init__(self, run_dir: Path, attempt: str, rank: int) -> None:
        self._path, self._claim = run_dir / NAME, run_dir / _CLAIM
        self.attempt, self._rank = attempt, rank
        self._progress: dict[str, Any] = {}
        self._written_at = -WRITE_EVERY_S

    def open(self) -> None:
        """Start the record of this attempt. Only the holder of the run's lock may call it."""
        self._claim.unlink(missing_ok=True)
        write_record(self._path, Record(attempt=self.attempt, rank=self._rank))
        note(self._path.parent, "start", attempt=self.attempt)

    def report(self, step: int, steps: int, counts: Mapping[str, int | float]) -> None:
        """Note the progress of the run. The first rank writes it, at most once a second."""
        first = self._progress.get("first_step", step)
        # Only leaders know the counts. Another rank that ends the run must not replace them by zeros.
        own = {"counts": dict(counts)} if counts else {}
        self._progress = {"step": step, "steps": steps, "first_step": first, **own}
        now = time.monotonic()
        if self._rank == 0 and now - self._written_at >= WRITE_EVERY_S:
            self._written_at = now
            try:
                if (record := self.read()) and record.state == "running":
                    write_record(self._path, replace(record, **self._progress))
                    self.settle()  # another rank may have ended the run in the meantime
            except OSError as error:  # the run ends only if its other files cannot be written either
                warn_often(log, "%s cannot be written: %s", self._path, error)

    def read(self) -> Record | None:
        """Return the record of this attempt; None if it has none yet, or if the file belongs to another attempt."""
        return self.ended() or self._mine(self._path)

    def ended(self) -> Record | None:
        """Return the record of this attempt's end; None if no process has reported it yet."""
        return self._mine(self._claim)

    def end(self, cause: Cause, message: str) -> Record | None:
        """Report why the attempt ends, unless another process has. Return the written record, or None.

        Raises:
            OSError: the record cannot be written.
        """
        record = self.read()
        if record is None or record.state == "ended":
            return None
        last = replace(
            record,
            state="ended",
            cause=cause.label,
            status=cause.status,
            requeue=cause.requeue,
            message=message,
            what_to_do=cause.value.advice,
            rank=self._rank,
            host=platform.node(),
            pid=os.getpid(),
            ended=_now(),
            **self._progress,
        )
        if not make_exclusively(self._claim, _text(last)):
            return None
        note(self._path.parent, "end", attempt=self.attempt, cause=cause.label)
        self.settle()
        return last

    def settle(self) -> None:
        """Write the first reported end to the status file."""
        if (last := self.ended()) is not None:
            replace_file(self._path, _text(last))

    def _mine(self, path: Path) -> Record | None:
        record = _parse(path)
        return record if record is not None and record.attempt == self.attempt else None


def read_status(run_dir: Path) -> Record | None:
    """Return the status of a run folder; None if there is none or it cannot be read."""
    return _parse(run_dir / NAME)


def _parse(path: Path) -> Record | None:
    try:
        return Record(**parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


_current: RunStatus | None = None  # of this process, as logging's root logger is


@contextlib.contextmanager
def current(run_status: RunStatus) -> Iterator[RunStatus]:
    """Make :func:`report` write to ``run_status``."""
    global _current
    _current = run_status
    try:
        yield run_status
    finally:
        _current = None


def report(*, step: int, steps: int, counts: Mapping[str, int | float] | None = None) -> None:
    """Report the progress of the run. Call it on every rank when the loop begins and after each step.

    The record of the run's end includes the progress. In a process that is no rank of a run this does nothing.

    Args:
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        counts: other numbers for the last line and ``status.json``, such as groups graded and dropped.
    """
    if _current is not None:
        _current.report(step, steps, counts or {})


def _text(record: Record) -> str:
    return json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n"


def write_record(path: Path, record: Record) -> None:
    """Write a status file."""
    replace_file(path, _text(record), durable=False)  # progress is in the checkpoints too


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
