"""Notices a rank that stalls, warns and names it with its activity, and ends the run if it hangs.

Each rank has a thread that writes ``run.dir/heartbeats/rank_00003.json`` every few seconds: the activity of the main
thread (:func:`mark`), its stack, and how long it has not moved. The rules compare times of the monotonic clock of the
rank that reads, so a step of the time of day changes nothing:

1. Each rank reads the heartbeat of the next rank (the last reads the first's). If it does not change, the process is
   stopped or its host is gone. There is a warning after :data:`.pace.SILENCE_S`, or after three usual steps and
   :data:`.pace.SLACK_S` if that is longer, and the run ends after ``run.watchdog_s``. A rank that still imports may be
   silent for :data:`START_S`, until the reader has done a step, in which all ranks take part.
2. If the main thread of the first rank has not moved for ``run.watchdog_s``, it reads all heartbeats. If no rank has
   moved, they all wait for a rank that hangs: the one that is not in a collective. The run ends.
3. If the first rank's part of a step takes much longer than usual (:mod:`.pace`), it reads all heartbeats twice and
   warns of the ranks that give no sign of life, else of those for which the others wait. Each rank then writes the
   stacks of its own threads to its log.

A main thread moves when it calls :func:`mark`, when work is counted on a bar (:mod:`~megatron_dypo.metrics.progress`),
or when its stack changes between two looks. So a rank that waits for others does not move, but is not blamed as long
as any rank moves. Rules 2 and 3 apply after the first mark. As long as a usual time is not known, rule 3's warning
comes when no rank has moved for half of ``run.watchdog_s``. A thread that was itself stopped excuses the others for
that time.

If a run has ended with an error, its remaining ranks end too, also on a node whose launcher has not noticed.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from megatron_dypo.ending import Cause
from megatron_dypo.metrics.logs import write_stacks
from megatron_dypo.metrics.progress import updates_of_bars
from megatron_dypo.metrics.status import RunStatus
from megatron_dypo.processes.heartbeats import (
    FOLDER,
    Heartbeat,
    blame,
    heartbeat_path,
    is_in_collective,
    read_heartbeat,
    stack_of,
    stack_signature,
    where,
    write_heartbeat,
)
from megatron_dypo.processes.identity import own_identity
from megatron_dypo.processes.pace import STARTING, Pace
from megatron_dypo.processes.stalls import (
    PartWatch,
    forget_stalls,
    make_dump,
    name_of_all,
    warn_of_recovery,
    warn_of_silence,
)

_LOOKS = 10
"""Number of looks within ``run.watchdog_s``."""
_MAX_INTERVAL_S = 10.0
_GAP = 3.0
"""Looks that a thread may miss. If it misses more, it was stopped itself, or its file system did not answer."""
START_S = 300.0
"""Longest time until a rank's first heartbeat, and between two while it imports."""
_NOT_SHARED = "it did not start, or its node has another file system at run.dir"
AFTER_END_S = 20.0
"""Longest time for a rank to end on its own after the run has ended with an error."""


@dataclass
class Work:
    """The activity of the main thread: a part of a step."""

    marks: int = 0
    pace: Pace = field(default_factory=Pace)


WORK = Work()  # of this process, as the main thread is


def mark(part: str) -> None:
    """Record the activity of the main thread, and that it moves: ``mark("collecting")``.

    Call it at the beginning of each part of a step, and in each turn of a loop that waits for rollouts or servers. It
    costs almost nothing.
    """
    WORK.pace.enter(part, time.monotonic())
    WORK.marks += 1


def begin_step() -> None:
    """Record that a step begins, so that the usual time of a step is known."""
    WORK.pace.begin_step(time.monotonic())


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
    if os.environ.get("RANK", "0") == "0":
        forget_stalls(run_dir)
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
        self._is_next_stalled = self._has_warned = False
        self._interval_s = min(_MAX_INTERVAL_S, patience_s / _LOOKS)
        self._part_watch = PartWatch(run_dir, self._rank, interval_s=self._interval_s, ends_s=patience_s)

    def run(self) -> None:
        """Look several times within ``run.watchdog_s``, until :meth:`finish`. This is the body of the thread."""
        looked_at = time.monotonic()
        self.look(looked_at)  # at once: others can name a rank only by its heartbeat
        while not self._is_over.wait(self._interval_s):
            now = time.monotonic()
            if now - looked_at > _GAP * self._interval_s:
                self.excuse(now - looked_at)
            looked_at = now
            self.look(now)

    def excuse(self, seconds: float) -> None:
        """Leave out ``seconds`` in which this thread could not look: they say nothing about others."""
        self._moved_at += seconds
        self._next_seen_at += seconds
        WORK.pace.excuse(seconds)

    def finish(self) -> None:
        """Write a last heartbeat, and stop looking."""
        self._is_over.set()
        write_heartbeat(self._run_dir, replace(self._own(time.monotonic()), is_last=True))

    def look(self, now: float) -> None:
        """Write this rank's heartbeat, and look at those of others."""
        own = self._own(now)
        write_heartbeat(self._run_dir, own)
        self._end_with_run(now)
        if WORK.marks:
            limit_s = WORK.pace.part_limit_s(self._patience_s / 2)
            self._part_watch.look(own, WORK.pace, now, limit_s=limit_s, read_all=lambda: self._all(own))
        if self._world == 1:
            if own.idle_s >= self._patience_s and WORK.marks:
                self._end([own], f"{own.name()} has not moved for {own.idle_s:.0f} s: {own.place()}")
            return
        self._look_at_next(now)
        if self._rank == 0 and WORK.marks and own.idle_s >= self._patience_s:
            self._look_at_all(own)

    def _own(self, now: float) -> Heartbeat:
        frame = sys._current_frames().get(self._main or 0)
        look = (WORK.marks, updates_of_bars(), *stack_signature(frame))
        if look != self._last_look:
            self._last_look, self._moved_at = look, now
        self._beats += 1
        return Heartbeat(
            attempt=self._status.attempt,
            rank=self._rank,
            host=platform.node(),
            process=self._identity,
            beats=self._beats,
            part=WORK.pace.part,
            where=where(frame),
            stack=stack_of(frame),
            is_in_collective=is_in_collective(frame),
            idle_s=now - self._moved_at,
            part_s=WORK.pace.seconds_in_part(now),
        )

    def _end_with_run(self, now: float) -> None:
        ended = self._status.ended()
        if ended is None or not ended.status:
            return
        self._ended_at = self._ended_at or now
        if now - self._ended_at >= AFTER_END_S:
            write_stacks(self._run_dir, self._rank, "the run has ended; this rank has not")
            self._leave(Cause.RANK_LOST, "the run has ended")

    def _look_at_next(self, now: float) -> None:
        rank, limit_s = (self._rank + 1) % self._world, WORK.pace.silence_limit_s(self._patience_s / 2)
        if self._next is not None and self._next.part == STARTING and WORK.pace.steps < 2:
            limit_s = min(START_S, self._patience_s / 2)
        found = self._read(rank)
        silence = now - self._next_seen_at
        if found is not None and (self._next is None or found.beats != self._next.beats or found.is_last):
            self._next, self._next_seen_at = found, now
            if self._has_warned:
                warn_of_recovery(self._run_dir, found)
            self._is_next_stalled = self._has_warned = False
        elif self._next is not None and silence >= self._patience_s:
            last = self._next
            self._end([last], f"{last.name()} has given no sign of life for {silence:.0f} s; it was {last.place()}")
        elif self._next is not None and silence >= limit_s and not self._is_next_stalled:
            self._is_next_stalled, usual_s = True, WORK.pace.usual_step_s()
            self._has_warned = warn_of_silence(
                self._run_dir, self._next, silence, usual_s=usual_s, ends_s=self._patience_s
            )
        elif self._next is None and silence >= max(self._patience_s, START_S):
            self._end_without(rank)

    def _all(self, own: Heartbeat) -> list[Heartbeat]:
        """Return the heartbeats of all ranks that have not ended, on the first rank; else this rank's own."""
        others = [self._read(rank) for rank in range(1, self._world)] if self._rank == 0 else []
        return [own, *(beat for beat in others if beat is not None and not beat.is_last)]

    def _look_at_all(self, own: Heartbeat) -> None:
        beats = self._all(own)
        if min(beat.idle_s for beat in beats) < self._patience_s:
            return
        if (missing := next((rank for rank in range(self._world) if self._read(rank) is None), None)) is not None:
            self._end_without(missing)
            return
        hung = blame(beats)
        first = hung[0]
        self._end(hung, f"no rank moves: {name_of_all(hung)} has not for {first.idle_s:.0f} s, {first.place()}")

    def _end_without(self, rank: int) -> None:
        path = heartbeat_path(self._run_dir, rank)
        self._end([], f"rank {rank} has given no sign of life in {path}: {_NOT_SHARED}")

    def _end(self, hung: Sequence[Heartbeat], message: str) -> None:
        write_stacks(self._run_dir, self._rank, message)
        self._leave(Cause.RANK_HUNG, message, lambda: make_dump(hung, self._identity))

    def _read(self, rank: int) -> Heartbeat | None:
        beat = read_heartbeat(self._run_dir, rank)
        return beat if beat is not None and beat.attempt == self._status.attempt else None
