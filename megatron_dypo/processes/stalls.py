"""Warnings of ranks that stall: one line for each stall, in the first rank's log and on the terminal, long before the
end of the run at ``run.watchdog_s``."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_dypo.config.words import counted
from megatron_dypo.fs import make_exclusively
from megatron_dypo.metrics.logs import append_line, write_stacks
from megatron_dypo.processes.heartbeats import FOLDER, Heartbeat, blame
from megatron_dypo.processes.identity import ProcessIdentity
from megatron_dypo.processes.pace import Pace

_LOOKS = 2.5
"""Looks between the two readings of all heartbeats, in which every living rank writes at least one."""
_MAX_NAMED = 8
_PY_SPY_S = 20.0


class PartWatch:
    """Watches the part of a step that a rank is in. The first rank warns, once for each part of a step."""

    def __init__(self, run_dir: Path, rank: int, *, interval_s: float, ends_s: float) -> None:
        """
        Args:
            interval_s: seconds from one look to the next.
            ends_s: ``run.watchdog_s``.
        """
        self._run_dir, self._rank, self._interval_s, self._ends_s = run_dir, rank, interval_s, ends_s
        self._place: tuple[int, str] | None = None
        """Step and part that take too long."""
        self._since = 0.0
        self._beats: Mapping[int, int] = {}
        self._is_named = self._has_warned = False
        self._silent: set[int] = set()
        """The ranks that warnings of this part named as silent."""

    def look(
        self, own: Heartbeat, pace: Pace, now: float, *, limit_s: float, read_all: Callable[[], list[Heartbeat]]
    ) -> None:
        """Write this rank's stacks if its part takes longer than ``limit_s``; on the first rank, read all and warn.

        A part without a usual time may be long; it has stalled if no rank has moved for ``limit_s``.
        """
        place, is_known = (pace.steps, pace.part), pace.usual_part_s() is not None
        is_stalled = (own.part_s if is_known else own.idle_s) >= limit_s
        if self._place is not None and (not is_stalled or place != self._place):
            if self._has_warned:
                for beat in [beat for beat in read_all() if beat.rank in self._silent] or [own]:
                    warn_of_recovery(self._run_dir, beat)
            self._begin(None, now)
        if not is_stalled:
            return
        if self._place is None:
            self._begin(place, now)
            write_stacks(self._run_dir, self._rank, f"this rank has been {own.part} for {own.part_s:.0f} s")
            if self._rank == 0:
                self._beats = {beat.rank: beat.beats for beat in read_all()}
        elif self._rank == 0 and not self._is_named and now - self._since >= _LOOKS * self._interval_s:
            beats = read_all()
            silent = [beat for beat in beats if self._beats.get(beat.rank) == beat.beats]
            if silent or is_known or min(beat.idle_s for beat in beats) >= limit_s:
                self._is_named = True
                self._name(silent, beats, pace, now - self._since)

    def _begin(self, place: tuple[int, str] | None, now: float) -> None:
        self._place, self._since, self._beats = place, now, {}
        self._is_named, self._has_warned, self._silent = False, False, set()

    def _name(self, silent: Sequence[Heartbeat], beats: Sequence[Heartbeat], pace: Pace, silence_s: float) -> None:
        """Warn of the ranks that gave no sign of life since the first reading; else of those that others wait for."""
        for beat in silent[:_MAX_NAMED]:
            if warn_of_silence(self._run_dir, beat, silence_s, usual_s=pace.usual_step_s(), ends_s=self._ends_s):
                self._has_warned = True
                self._silent.add(beat.rank)
        if not silent:
            warn_of_part(self._run_dir, blame(beats), usual_s=pace.usual_part_s(), ends_s=self._ends_s)
            self._has_warned = True


def warn(run_dir: Path, text: str) -> None:
    """Write a warning to the first rank's log and to the terminal, from any rank."""
    with contextlib.suppress(OSError):  # a full disk: the terminal has the line
        append_line(run_dir, 0, text, level=logging.WARNING)
    print(f"megatron-dypo: warning: {text}", file=sys.stderr, flush=True)


def warn_of_silence(run_dir: Path, last: Heartbeat, silence_s: float, *, usual_s: float | None, ends_s: float) -> bool:
    """Warn of a rank that gives no sign of life since its heartbeat ``last``, unless another rank has done so.

    Returns whether this call warned.
    """
    claim = run_dir / FOLDER / f"stall_{last.rank:05d}_{last.process.pid}_{last.beats}"
    with contextlib.suppress(OSError):  # a full disk: better two warnings than none
        if not make_exclusively(claim, ""):
            return False
    usual = "" if usual_s is None else f" (a step usually takes {usual_s:.1f} s)"
    said = f"{last.name()} has given no sign of life for {silence_s:.0f} s{usual}; it was {last.part} at {last.stack}"
    warn(run_dir, f"stall: {said}; {_end(ends_s)}")
    _write_stack(run_dir, last)
    return True


def warn_of_part(run_dir: Path, blamed: Sequence[Heartbeat], *, usual_s: float | None, ends_s: float) -> None:
    """Warn of a part of a step that takes much longer than usual, and name the ranks for which the others wait."""
    first = blamed[0]
    usual = "no usual time is known" if usual_s is None else f"usually {usual_s:.1f} s"
    said = f"{name_of_all(blamed)} has been {first.part} for {first.part_s:.0f} s ({usual}); it is at {first.stack}"
    warn(run_dir, f"stall: {said}; {_end(ends_s)}")
    _write_stack(run_dir, first)


def name_of_all(blamed: Sequence[Heartbeat]) -> str:
    """Return the name of the first of some ranks, and the number of the others."""
    more = f" (and {counted(len(blamed) - 1, 'more rank')} like it)" if len(blamed) > 1 else ""
    return f"{blamed[0].name()}{more}"


def warn_of_recovery(run_dir: Path, beat: Heartbeat) -> None:
    """Report that a rank moves again after a warning."""
    warn(run_dir, f"stall over: {beat.name()} moves again, {beat.part}")


def forget_stalls(run_dir: Path) -> None:
    """Remove the claims of earlier attempts to warn."""
    for claim in (run_dir / FOLDER).glob("stall_*"):
        claim.unlink(missing_ok=True)


def _end(ends_s: float) -> str:
    return f"run.watchdog_s={ends_s:g} will end the run"


def _write_stack(run_dir: Path, beat: Heartbeat) -> None:
    """Write the stacks of a process of this machine to the first rank's log, if py-spy is installed."""
    if text := look_from_outside(beat.process):
        with contextlib.suppress(OSError):
            append_line(run_dir, 0, f"the stacks of {beat.name()} according to py-spy:\n{text}")


def look_from_outside(process: ProcessIdentity) -> str:
    """Return the stacks of another process of this machine, even a stopped one, by py-spy; "" without py-spy."""
    program = shutil.which("py-spy")
    if program is None or not process.is_on_this_machine() or not process.is_alive():
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(process.pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy failed: {error}"
    return done.stdout or f"py-spy failed: {done.stderr.strip()}"


def make_dump(hung: Sequence[Heartbeat], own: ProcessIdentity) -> None:
    """Make hung ranks of this machine, also stopped ones, write their stacks (faulthandler, on SIGABRT) and end."""
    for beat in hung:
        if beat.process != own and beat.process.is_on_this_machine() and beat.process.is_alive():
            os.kill(beat.process.pid, signal.SIGABRT)
            os.kill(beat.process.pid, signal.SIGCONT)
