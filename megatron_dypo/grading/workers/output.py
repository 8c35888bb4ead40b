"""The output of verifiers, passed on to standard error up to a limit."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import IO

_LIMIT_BYTES = 64 * 1024
_STDERR = 2


class OutputTap:
    """Reads what verifier processes print and passes the first 64 KiB of it on, over all processes together.

    The rest is read and discarded, so that a verifier that prints much neither fills the run's log nor has to wait.
    """

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit = self._left = limit_bytes
        self._lock = threading.Lock()

    def follow(self, stream: IO[bytes]) -> threading.Thread:
        """Start to read ``stream``, which is closed at its end; the thread ends then too."""
        thread = threading.Thread(target=self._drain, args=(stream,), name="verifier-output", daemon=True)
        thread.start()
        return thread

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := os.read(stream.fileno(), 65536):
                self._pass_on(chunk)

    def _pass_on(self, chunk: bytes) -> None:
        with self._lock:
            shown = chunk[: self._left]
            self._left -= len(shown)
            if len(shown) < len(chunk) and self._limit:
                shown += f"\n[what verifiers print beyond {self._limit} bytes is not shown]\n".encode()
                self._limit = 0  # said once
        while shown:
            with suppress(OSError):  # nobody reads the log: no reason to hold up a verifier
                shown = shown[os.write(_STDERR, shown) :]
                continue
            return
