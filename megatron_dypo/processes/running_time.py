"""A clock that stands still while this process is stopped, for deadlines of others: of servers, of hosts, of requests.

A job may be stopped as a whole and go on later (``scontrol suspend``, a scheduler that suspends instead of preempting,
SIGSTOP). The monotonic clock runs on, so that every open request would be too late at once. This module needs only the
standard library, since servers import it too.
"""

from __future__ import annotations

import os
import threading
import time

_TICK_S = 1.0
_GAP_S = 5.0
"""A gap between two readings that is longer than this is time in which the process did not run."""


class RunningTime:
    """The clock of one process. It ticks once a second in a thread, and with each reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._read_at = 0.0, time.monotonic()
        self._thread: threading.Thread | None = None

    def read(self) -> float:
        """Return seconds since an arbitrary moment, without those in which the process was stopped.

        Of a stop of more than 5 s, one second counts. A shorter one counts in full, as a busy machine does.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._tick, name="running-time", daemon=True)
                self._thread.start()
            return self.advance(time.monotonic())

    def advance(self, now: float) -> float:
        """Return the reading when the monotonic clock shows ``now``."""
        gap_s, self._read_at = max(now - self._read_at, 0.0), max(now, self._read_at)
        self._seconds += _TICK_S if gap_s > _GAP_S else gap_s
        return self._seconds

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_S)
            self.read()


_clock = RunningTime()


def running_time() -> float:
    """Return :meth:`RunningTime.read` of this process's clock. Any thread may call it."""
    return _clock.read()


def _begin_anew() -> None:
    global _clock
    _clock = RunningTime()  # a forked child has no thread that ticks, and perhaps a locked lock


os.register_at_fork(after_in_child=_begin_anew)
