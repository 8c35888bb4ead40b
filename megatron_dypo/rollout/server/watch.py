"""Names a server that stops answering: its process is stopped, its host is gone, or its event loop hangs.

Whoever started the server also ends it after ``run.watchdog_s``, and its supervisor starts it again. A scheduler that
hangs in a batch is left to SGLang's own watchdog, which ends the server after ``--watchdog-timeout`` (300 s).
A server that has ended refuses connections. That is no stall: its supervisor, the clients and the refits notice it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import aiohttp

from megatron_dypo.rollout.server.reach import is_answer_of_host

EVERY_S = 10.0
"""Seconds between two questions to a server; it is also the longest wait for an answer."""
SILENCE_S = 30.0
"""Seconds without an answer after which a server is named."""
_GAP = 3.0
"""Intervals between two questions, the wait for an answer included, above which this process itself was stopped."""


class ServerWatch:
    """A thread that asks every server for its health, in the process of the first rank or of ``megatron-dypo serve``; a
    context manager."""

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        warn: Callable[[str], None],
        *,
        find_stopped: Callable[[], Mapping[str, str]] = dict,
        stacks_of: Callable[[str], str] = lambda _: "",
        end: Callable[[str], bool] = lambda _: False,
        ends_s: float = math.inf,
        every_s: float = EVERY_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        """Watch the servers at ``urls`` from now on, and pass each warning to ``warn``.

        Args:
            find_stopped: returns URL → process for servers of which a process is stopped, even if another one answers.
            stacks_of: returns the stacks of a server's process for the warning; "" if they cannot be seen from here.
            end: ends the server at a URL, and returns whether this process may do so.
            ends_s: seconds without an answer after which a server is ended; ``run.watchdog_s``.
        """
        self._urls, self._api_key, self._warn, self._find_stopped = tuple(urls), api_key, warn, find_stopped
        self._stacks_of, self._end, self._ends_s = stacks_of, end, ends_s
        self._every_s, self._silence_s = every_s, silence_s
        now = time.monotonic()
        self._heard_at, self._silent = dict.fromkeys(self._urls, now), set[str]()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._watch())
        self._thread = threading.Thread(target=self._run, name="server-watch", daemon=True)

    def __enter__(self) -> ServerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _watch(self) -> None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limit = aiohttp.ClientTimeout(total=self._every_s)
        async with aiohttp.ClientSession(headers=headers, timeout=limit, trust_env=False) as session:
            asked_at = time.monotonic()
            while True:
                await asyncio.sleep(self._every_s)
                gap_s, asked_at = time.monotonic() - asked_at, time.monotonic()
                if gap_s > _GAP * self._every_s:
                    self.excuse(gap_s)
                answers = await asyncio.gather(*(_answers(session, url) for url in self._urls))
                self.judge(answers, time.monotonic(), self._find_stopped())

    def excuse(self, seconds: float) -> None:
        """Leave out ``seconds`` in which this process itself was stopped."""
        self._heard_at = {url: heard_at + seconds for url, heard_at in self._heard_at.items()}

    def judge(self, answers: Sequence[bool], now: float, stopped: Mapping[str, str]) -> None:
        """Warn once of each server that did not answer, or was ``stopped``, for too long, and once when that ends."""
        for url, has_answered in zip(self._urls, answers, strict=True):
            silence_s = now - self._heard_at[url]
            if has_answered and url not in stopped:
                self._heard_at[url] = now
                if url in self._silent:
                    self._silent.remove(url)
                    self._warn(f"stall over: the server {url} answers again, after {silence_s:.0f} s")
            elif silence_s >= self._silence_s and url not in self._silent:
                self._silent.add(url)
                hangs = f"has not answered for {silence_s:.0f} s: its process hangs, or its host is gone"
                rests = f"has stood still for {silence_s:.0f} s: {stopped.get(url)} is stopped"
                self._warn(f"stall: the server {url} {rests if url in stopped else hangs}{self._stacks(url)}")
            elif silence_s >= self._ends_s and self._end(url):
                self._heard_at[url] = now
                self._silent.discard(url)
                self._warn(f"the server {url} is ended: it has not moved for {silence_s:.0f} s (run.watchdog_s)")

    def _stacks(self, url: str) -> str:
        found = self._stacks_of(url)
        return f"; its stacks according to py-spy:\n{found}" if found else ""


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    """Return whether a server answers at all, with any status, or refuses at once."""
    try:
        async with session.get(f"{url}/health", allow_redirects=False) as response:
            await response.release()
    except asyncio.TimeoutError:
        return False
    except (aiohttp.ClientError, OSError) as error:
        return is_answer_of_host(error)
    return True
