"""Repeated warnings: the first is written, the others are counted.

``warn_often(log, "%s: no answer: %s", url, error)`` takes the template as the kind of a warning. ``logs`` exports it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0
"""Seconds after a line during which warnings of the same kind are only counted."""
MAX_KINDS = 256
"""Most kinds that are counted at a time. Beyond that, the least recent kind is dropped and its count written."""


@dataclass(kw_only=True)
class _Kind:
    logger: logging.Logger
    until: float
    """Time on the clock until which warnings are only counted."""
    num_held: int = 0
    """Warnings counted since the last line."""
    last: str = ""
    """Text of the last counted warning."""

    def write_held(self) -> None:
        if self.num_held:
            self.logger.warning("%s%s", self.last, _others(self.num_held - 1))
            self.num_held = 0


class RepeatedWarnings:
    """Counts of warnings by kind; threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, str], _Kind] = OrderedDict()
        self._lock = threading.RLock()  # a failing handler may itself warn

    def warn(self, logger: logging.Logger, template: str, *args: object) -> None:
        """Write the warning if it is the first of its kind in this window, else count it."""
        with self._lock:
            now, key = self._clock(), (logger.name, template)
            kind = self._kinds.pop(key, None)
            for other in self._kinds.values():
                if other.until <= now:
                    other.write_held()
            if kind is None:
                while len(self._kinds) >= MAX_KINDS:
                    self._kinds.popitem(last=False)[1].write_held()
                kind = _Kind(logger=logger, until=now)
            self._kinds[key] = kind
            text = template % args if args else template
            if now < kind.until:
                kind.num_held, kind.last = kind.num_held + 1, text
                return
            logger.warning("%s%s", text, _others(kind.num_held))
            kind.num_held, kind.until = 0, now + WINDOW_S

    def __len__(self) -> int:
        """Return how many kinds are counted now."""
        return len(self._kinds)

    def flush(self) -> None:
        """Write the counts not written yet, and start again."""
        with self._lock:
            while self._kinds:
                self._kinds.popitem(last=False)[1].write_held()


_warnings = RepeatedWarnings()
atexit.register(_warnings.flush)


def warn_often(logger: logging.Logger, template: str, *args: object) -> None:
    """Warn of something that may happen thousands of times, such as a failed request.

    The first warning with this template is written. Those of the next :data:`WINDOW_S` seconds are counted, and written
    as one line, "<the last of them> (and 311 more like it)", with the next warning after that time or at the end.
    """
    _warnings.warn(logger, template, *args)


def flush_repeated() -> None:
    """Write the counts of :func:`warn_often` that are not written yet."""
    _warnings.flush()


def _others(count: int) -> str:
    return f" (and {count} more like it)" if count else ""
