"""The usual time of a run's step and of its parts, learned from the run itself.

A stall is a part of a step that takes much longer than usual. All times are of the monotonic clock, so a step of the
time of day changes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_KEPT = 32
"""Recent steps from which a usual time is learned."""
_NEEDED = 3
"""Steps after which a time counts as usual. The first step compiles, and fills caches."""
_MULTIPLE = 3.0
_VARYING_MULTIPLE = 1.5
"""Times the second longest of recent steps, one of which may have stalled: a part whose time varies is no stall."""
SLACK_S = 19.0
"""Seconds beyond the multiple of a usual time. With four looks of the watchdog it is less than a minute: it notices up
to one look late, and names a rank three looks after that."""
SILENCE_S = 40.0
"""Shortest silence of another rank that is a stall. It is longer than the stop of a whole job that its ranks do not
notice themselves (three looks of the watchdog), and one look."""
STARTING = "starting"
"""The part before the first one that is marked. Imports may keep a rank's threads, and so its heartbeat, waiting."""


@dataclass
class Pace:
    """The main thread's place in its step, and the times of earlier steps. Only the main thread enters parts.

    A part's time is its sum within a step, since a step may come back to a part (as rollouts and a teacher alternate).
    """

    part: str = STARTING
    steps: int = 0
    """Steps begun."""
    _begun_at: float | None = None
    _entered_at: float = field(default_factory=time.monotonic)
    _spent: dict[str, float] = field(default_factory=dict)
    _step_times: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _part_times: dict[str, deque[float]] = field(default_factory=dict)

    def begin_step(self, now: float) -> None:
        """Begin a step, which ends the one before; all that came between two steps counts as the earlier one's."""
        self.enter(self.part, now)
        if self._begun_at is not None:
            self._step_times.append(now - self._begun_at)
            for part, seconds in self._spent.items():
                self._part_times.setdefault(part, deque(maxlen=_KEPT)).append(seconds)
        self._spent = {}
        self._begun_at = now
        self.steps += 1

    def enter(self, part: str, now: float) -> None:
        """Enter a part of the step, or go on in it."""
        self._spent[self.part] = self._spent.get(self.part, 0.0) + now - self._entered_at
        self.part, self._entered_at = part, now

    def excuse(self, seconds: float) -> None:
        """Leave out ``seconds`` in which the whole process was stopped."""
        self._entered_at += seconds
        if self._begun_at is not None:
            self._begun_at += seconds

    def seconds_in_part(self, now: float) -> float:
        """Return the time of the current part, within this step."""
        return self._spent.get(self.part, 0.0) + now - self._entered_at

    def usual_step_s(self) -> float | None:
        """Return the usual time from one step to the next; None as long as it is not known."""
        return _usual(self._step_times)

    def usual_part_s(self) -> float | None:
        """Return the usual time of the current part within a step; None as long as it is not known."""
        return _usual(self._part_times.get(self.part, ()))

    def part_limit_s(self, latest_s: float) -> float:
        """Return the time of the current part beyond which it stalls: ``latest_s``, or earlier by its usual time."""
        times = sorted(self._part_times.get(self.part, ()))
        usual = _usual(times)
        if usual is None:
            return latest_s
        return min(max(_MULTIPLE * usual, _VARYING_MULTIPLE * times[-2]) + SLACK_S, latest_s)

    def silence_limit_s(self, latest_s: float) -> float:
        """Return the time without a sign of life beyond which another rank stalls, at most ``latest_s``.

        Heartbeats come from a thread of their own, so that it needs no usual time. Of long steps it is a multiple: what
        they write may keep the file system of the heartbeats busy.
        """
        return min(max(_MULTIPLE * (self.usual_step_s() or 0.0) + SLACK_S, SILENCE_S), latest_s)


def _usual(times: Sequence[float]) -> float | None:
    return statistics.median(times) if len(times) >= _NEEDED else None
