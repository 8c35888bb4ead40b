"""Begins requests a few at a time, so that the event loop serves the open ones in between."""

from __future__ import annotations

import asyncio
from collections import deque

_AT_ONCE = 4
"""Requests that begin in one turn of the event loop. Each takes it about half a millisecond, for a new connection."""


class Starts:
    """Gives requests their turn to begin: a few in each turn of the event loop, in the order in which they ask."""

    def __init__(self) -> None:
        self._asking: deque[asyncio.Future[None]] = deque()
        self._is_giving = False

    async def turn(self) -> None:
        """Wait until this request may begin."""
        loop = asyncio.get_running_loop()
        asking = loop.create_future()
        self._asking.append(asking)
        if not self._is_giving:
            self._is_giving = True
            loop.call_soon(self._give, loop)
        await asking

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        given = 0
        while self._asking and given < _AT_ONCE:
            asking = self._asking.popleft()
            if not asking.done():  # not cancelled
                asking.set_result(None)
                given += 1
        self._is_giving = bool(self._asking)
        if self._is_giving:
            loop.call_soon(self._give, loop)
