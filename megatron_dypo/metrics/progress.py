"""Progress of long operations: a bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from tqdm import tqdm

_LOG_EVERY_S = 10.0


class Progress(Protocol):
    """The bar of ``with progress(...) as bar``; a ``tqdm`` bar fits too."""

    def update(self, n: float | None = 1) -> object:
        """Count ``n`` more units as done."""


class _Counted:
    """Passes the units on to a bar, and counts the updates of all bars of this process."""

    updates = 0

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def update(self, n: float | None = 1) -> None:
        _Counted.updates += 1
        self._bar.update(n)


def updates_of_bars() -> int:
    """Return how often work of this process was counted, on any bar, shown or not: while it grows, the work goes on."""
    return _Counted.updates


class _Lines:
    """Writes ``desc: 12/64 prompts, 3.1/s`` to a stream that is no terminal, at most once in ``every_s`` seconds.

    A task that succeeds within that time writes no line, so that the log stays short.
    """

    def __init__(self, total: int, desc: str, unit: str, stream: TextIO, every_s: float) -> None:
        self._total, self._desc, self._unit = total, desc, unit
        self._stream, self._every_s = stream, every_s
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def update(self, n: float | None = 1) -> None:
        self._done += n or 0
        if time.monotonic() - self._last >= self._every_s:
            self._print()

    def close(self) -> None:
        is_short = time.monotonic() - self._start < self._every_s
        if not is_short or self._done < self._total:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        rate = self._done / max(self._last - self._start, 1e-9)
        print(
            f"{self._desc}: {self._done:g}/{self._total} {self._unit}, {rate:.1f} {self._unit}/s",
            file=self._stream,
            flush=True,
        )


class _Silent:
    def update(self, n: float | None = 1) -> None:
        pass


@contextmanager
def progress(
    total: int,
    desc: str,
    unit: str,
    *,
    enabled: bool = True,
    stream: TextIO | None = None,
    every_s: float = _LOG_EVERY_S,
) -> Iterator[Progress]:
    """Show how much of ``total`` ``unit`` (plural, such as ``prompts``) is done and at what rate.

    On a terminal it is a bar, removed at the end. Elsewhere it is a line at most every ``every_s`` seconds, and one at
    the end if the task took longer than that or failed.
    ``enabled=False`` (ranks other than the first) shows nothing. The default stream is stderr.

        with progress(len(prompts), "rollouts", "prompts") as bar:
            for prompt in prompts:
                ...
                bar.update(1)
    """
    stream = stream if stream is not None else sys.stderr
    if not enabled:
        yield _Counted(_Silent())
    elif stream.isatty():
        with tqdm(total=total, desc=desc, unit=f" {unit}", file=stream, leave=False, dynamic_ncols=True) as bar:
            yield _Counted(bar)
    else:
        lines = _Lines(total, desc, unit, stream, every_s)
        try:
            yield _Counted(lines)
        finally:
            lines.close()
