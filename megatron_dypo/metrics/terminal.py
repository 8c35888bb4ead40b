"""Standard output and standard error of a run, which may fail: a file on a full disk, a pipe that nobody reads."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class Terminal:
    """A text stream that loses what it cannot write. A run must not end for a line that nobody can read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if the stream takes it."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered if the stream takes it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_terminal() -> None:
    """Make this process survive its standard streams. Without it, Python would also end with status 120 in place of the
    run's own."""
    if not isinstance(sys.stdout, Terminal):
        sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
