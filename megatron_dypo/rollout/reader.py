"""Reads large answers in a thread, so that the event loop goes on with other requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_SMALL_BYTES = 2**15
"""An answer of fewer bytes is read at once. A thread would take longer to begin."""
_MOST_BYTES = 2**28
"""Bytes of answers that may be under way from a server, or wait for the thread. Beyond it no other answer is taken from
its connection, so that servers wait, and memory does not grow."""
_UNKNOWN_BYTES = 2**20
"""Bytes that an answer of unknown length counts as while it is under way."""
_STALLED_S = 10.0
"""Without an end of any answer for this time, the limit is raised by one answer: a server may have died."""


class AnswerReader:
    """The thread that reads answers, one at a time, and the bytes that it has not read. Used by one event loop."""

    def __init__(self, most_bytes: int = _MOST_BYTES, stalled_s: float = _STALLED_S) -> None:
        self._most_bytes, self._stalled_s = most_bytes, stalled_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._held = self._ends = 0
        self._asking: deque[tuple[asyncio.Future[None], int]] = deque()

    @contextlib.asynccontextmanager
    async def taking(self, num_bytes: int | None) -> AsyncIterator[None]:
        """Wait until there is room for an answer; it is taken from its connection within the block.

        Answers get their turn in the order in which they ask. One that has begun is never stopped.

        Args:
            num_bytes: size of the answer; None: unknown. It is counted as that many bytes until the end of the block.
        """
        size = _UNKNOWN_BYTES if num_bytes is None else num_bytes
        if size < _SMALL_BYTES:
            yield
            return
        await self._turn(size)
        try:
            yield
        finally:
            self._let_go(size)

    async def read(self, num_bytes: int, read: Callable[[], T]) -> T:
        """Return the result of ``read``, which handles an answer of ``num_bytes``; raise what it raises."""
        if num_bytes < _SMALL_BYTES:
            return read()
        self._held += num_bytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, read)
        finally:
            self._let_go(num_bytes)

    def close(self) -> None:
        """End the thread after the answer that it reads now."""
        self._thread.shutdown(cancel_futures=True)

    async def _turn(self, size: int) -> None:
        """Count an answer, when few enough bytes are held."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking.append((turn, size))
        self._give()
        try:
            while not turn.done():
                ends = self._ends
                await asyncio.wait([turn], timeout=self._stalled_s)
                if ends == self._ends:
                    self._make_room()
        except asyncio.CancelledError:
            if turn.done():
                self._let_go(size)
            turn.cancel()
            raise

    def _give(self) -> None:
        """Give the next answers their turns, while there is room."""
        while self._asking and (self._held == 0 or self._held + self._asking[0][1] <= self._most_bytes):
            turn, size = self._asking.popleft()
            if not turn.done():  # not cancelled
                self._held += size
                turn.set_result(None)

    def _make_room(self) -> None:
        """Raise the limit by what the next answer needs beside those that stall."""
        self._ends += 1  # others that wait as long need not do it too
        if self._asking:
            self._most_bytes = max(self._most_bytes, self._held + self._asking[0][1])
        self._give()

    def _let_go(self, size: int) -> None:
        self._held -= size
        self._ends += 1
        asyncio.get_running_loop().call_soon(self._give)  # an answer that was taken counts again, while it is read
