"""Reads large answers in a thread, so that the event loop goes on with other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_SMALL_BYTES = 2**15
"""An answer of fewer bytes is read at once. A thread would take longer to begin."""
_MOST_BYTES = 2**28
"""Bytes of whole answers that may wait for the thread. Beyond it no more bytes are taken from any connection, so that
servers wait, and memory does not grow."""


class AnswerReader:
    """The thread that reads answers, one at a time, and the bytes that wait for it. Used by one event loop."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._waiting = 0
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> None:
        """Wait until few bytes wait for the thread."""
        await self._room.wait()

    async def read(self, num_bytes: int, read: Callable[[], T]) -> T:
        """Return the result of ``read``, which handles an answer of ``num_bytes``; raise what it raises."""
        if num_bytes < _SMALL_BYTES:
            return read()
        self._count(num_bytes)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, read)
        finally:
            self._count(-num_bytes)

    def close(self) -> None:
        """End the thread after the answer that it reads now."""
        self._thread.shutdown(cancel_futures=True)

    def _count(self, num_bytes: int) -> None:
        self._waiting += num_bytes
        if self._waiting > self._most_bytes:
            self._room.clear()
        else:
            self._room.set()
