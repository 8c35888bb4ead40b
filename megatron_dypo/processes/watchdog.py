"""Notices a rank that hangs, names it and its activity, and ends the run.

Each rank has a thread that writes ``run.dir/heartbeats/rank_00003.json`` several times within ``run.watchdog_s``: the
activity of the main thread (:func:`mark`), its place in the code, and how long it has not moved. There are two rules,
both by the clock of the rank that reads:

1. Each rank reads the heartbeat of the next rank (the last reads the first's). If it does not change for
   ``run.watchdog_s``, the process is stopped or its host is gone.
2. If the main thread of the first rank has not moved for that long, it reads all heartbeats. If no rank has moved, they
   all wait for a rank that hangs: the one that is not in a collective.

A main thread moves when it calls :func:`mark`, or when its stack changes between two looks. So a rank that waits for
others does not move, but is not blamed as long as any rank moves. The second rule applies after the first mark, since
servers may take long to start.

If a run has ended with an error, its remaining ranks end too, also on a node whose launcher has not noticed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_dypo.config.words import counted
from megatron_dypo.ending import Cause
from megatron_dypo.metrics.logs import log_path
from megatron_dypo.metrics.status import RunStatus
from megatron_dypo.processes.heartbeats import (
    FOLDER,
    Heartbeat,
    blame,
    heartbeat_path,
    is_in_collective,
    read_heartbeat,
    stack_signature,
    where,
    write_heartbeat,
)
from megatron_dypo.processes.identity import ProcessIdentity, own_identity

_LOOKS = 10
"""Number of looks within ``run.watchdog_s``."""
_MAX_INTERVAL_S = 30.0
START_S = 300.0
"""Longest time until a rank's first heartbeat."""
_NOT_SHARED = "it did not start, or its node has another file system at run.dir"
AFTER_END_S = 20.0
"""Longest time for a rank to end on its own after the run has ended with an error."""


@dataclass
class Work:
    """The activity of the main thread: a part of a step."""

    part: str = "starting"
    marks: int = 0


WORK = Work()  # of this process, as the main thread is


def mark(part: str) -> None:
    """Record the activity of the main thread, and that it moves: ``mark("collecting")``.

    Call it at the beginning of each part of a step, and in each turn of a loop that waits for rollouts or servers. It
    costs almost nothing.
    """
    WORK.part = part
    WORK.marks += 1


class Leave(Protocol):
    """Ends this process at once; see :meth:`megatron_dypo.launch.attempt.Attempt.leave`."""

    def __call__(self, cause: Cause, message: str, before_exit: Callable[[], None] = ...) -> None: ...


def start(run_dir: Path, run_status: RunStatus, *, patience_s: float, leave: Leave) -> None:
    """Start this rank's watchdog thread. Call it from the main thread.

    Args:
        patience_s: ``run.watchdog_s``; 0: no watchdog.
    """
    if not patience_s:
        return
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    global _current
    _current = Watchdog(run_dir, run_status, patience_s=patience_s, leave=leave)
    threading.Thread(target=_current.run, name="watchdog", daemon=True).start()


def finish() -> None:
    """Record that this rank ends normally, so that its silence is no hang, and stop watching other ranks."""
    if _current is not None:
        _current.finish()


_current: Watchdog | None = None  # of this process


class Watchdog:
    """The thread of one rank. It reads the next rank's file; the first rank reads all files if it does not move."""

    def __init__(self, run_dir: Path, run_status: RunStatus, *, patience_s: float, leave: Leave) -> None:
        self._run_dir, self._status, self._patience_s, self._leave = run_dir, run_status, patience_s, leave
        self._rank, self._world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._main, self._identity = threading.main_thread().ident, own_identity()
        self._beats = 0
        self._is_over = threading.Event()
        self._moved_at = self._next_seen_at = time.monotonic()
        self._ended_at: float | None = None
        self._last_look: object = None
        self._next: Heartbeat | None = None

    def run(self) -> None:
        """Look several times within ``run.watchdog_s``, until :meth:`finish`. This is the body of the thread."""
        interval = min(_MAX_INTERVAL_S, self._patience_s / _LOOKS)
        while not self._is_over.wait(interval):
            self.look(time.monotonic())

    def finish(self) -> None:
        """Write a last heartbeat, and stop looking."""
        self._is_over.set()
        write_heartbeat(self._run_dir, replace(self._own(time.monotonic()), is_last=True))

    def look(self, now: float) -> None:
        """Write this rank's heartbeat, and look at those of others."""
        own = self._own(now)
        write_heartbeat(self._run_dir, own)
        self._end_with_run(now)
        if self._world == 1:
            if own.idle_s >= self._patience_s and WORK.marks:
                self._end([own], f"{own.name()} has not moved for {own.idle_s:.0f} s: {own.place()}")
            return
        self._look_at_next(now)
        if self._rank == 0 and WORK.marks and own.idle_s >= self._patience_s:
            self._look_at_all(own)

    def _own(self, now: float) -> Heartbeat:
        frame = sys._current_frames().get(self._main or 0)
        look = (WORK.marks, *stack_signature(frame))
        if look != self._last_look:
            self._last_look, self._moved_at = look, now
        self._beats += 1
        return Heartbeat(
            attempt=self._status.attempt,
            rank=self._rank,
            host=platform.node(),
            process=self._identity,
            beats=self._beats,
            part=WORK.part,
            where=where(frame),
            is_in_collective=is_in_collective(frame),
            idle_s=now - self._moved_at,
        )

    def _end_with_run(self, now: float) -> None:
        ended = self._status.ended()
        if ended is None or not ended.status:
            return
        self._ended_at = self._ended_at or now
        if now - self._ended_at >= AFTER_END_S:
            self._dump_stacks("the run has ended; this rank has not")
            self._leave(Cause.RANK_LOST, "the run has ended")

    def _look_at_next(self, now: float) -> None:
        rank = (self._rank + 1) % self._world
        found = self._read(rank)
        silence = now - self._next_seen_at
        if found is not None and (self._next is None or found.beats != self._next.beats or found.is_last):
            self._next, self._next_seen_at = found, now
        elif self._next is not None and silence >= self._patience_s:
            last = self._next
            self._end([last], f"{last.name()} has given no sign of life for {silence:.0f} s; it was {last.place()}")
        elif self._next is None and silence >= max(self._patience_s, START_S):
            self._end(
                [], f"rank {rank} has given no sign of life in {heartbeat_path(self._run_dir, rank)}: {_NOT_SHARED}"
            )

    def _look_at_all(self, own: Heartbeat) -> None:
        others = [self._read(rank) for rank in range(1, self._world)]
        beats = [own, *(beat for beat in others if beat is not None and not beat.is_last)]
        if min(beat.idle_s for beat in beats) < self._patience_s:
            return
        hung = blame(beats)
        first = hung[0]
        more = f" (and {counted(len(hung) - 1, 'more rank')} like it)" if len(hung) > 1 else ""
        self._end(hung, f"no rank moves: {first.name()}{more} has not for {first.idle_s:.0f} s, {first.place()}")

    def _end(self, hung: Sequence[Heartbeat], message: str) -> None:
        self._dump_stacks(message)
        self._leave(Cause.RANK_HUNG, message, lambda: make_dump(hung, self._identity))

    def _dump_stacks(self, why: str) -> None:
        with contextlib.suppress(OSError), log_path(self._run_dir, self._rank).open("a", encoding="utf-8") as file:
            file.write(f"{why}; the stacks of this rank's threads:\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def _read(self, rank: int) -> Heartbeat | None:
        beat = read_heartbeat(self._run_dir, rank)
        return beat if beat is not None and beat.attempt == self._status.attempt else None


def make_dump(hung: Sequence[Heartbeat], own: ProcessIdentity) -> None:
    """Make hung ranks of this machine, also stopped ones, write their stacks (faulthandler, on SIGABRT) and end."""
    for beat in hung:
        if beat.process != own and beat.process.is_on_this_machine() and beat.process.is_alive():
            os.kill(beat.process.pid, signal.SIGABRT)
            os.kill(beat.process.pid, signal.SIGCONT)
