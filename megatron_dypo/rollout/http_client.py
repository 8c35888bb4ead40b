"""Async HTTP requests to one or several servers, with load balancing, retries and deadlines."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ClassVar, Protocol, TypeVar

import aiohttp

from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.ask import (
    Answer,
    AskError,
    AttemptError,
    BusyError,
    LostServerError,
    OwnLackError,
    ask,
)
from megatron_dypo.rollout.attempts import Attempts
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.counts import AttemptCounts
from megatron_dypo.rollout.reader import AnswerReader
from megatron_dypo.rollout.starts import Starts

T = TypeVar("T")
T_Client = TypeVar("T_Client", bound="HttpClient")

_log = logging.getLogger(__name__)


class RequestLimits(Protocol):
    """The config fields that limit the requests of a client."""

    @property
    def max_in_flight(self) -> int: ...
    @property
    def request_deadline_s(self) -> float: ...
    @property
    def retries(self) -> int: ...


class HttpClient(AttemptCounts):
    """Sends requests to the least loaded of several servers. Use it as an async context manager.

    Proxies of the environment are not used.

    Args:
        urls: servers, or one router.
        api_key: sent as a bearer token, and never shown in a message. None: no key is sent.
        cfg: limits: ``max_in_flight`` requests open at once; ``request_deadline_s`` for a request from its first
            attempt to its last; ``retries`` attempts after the first.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
    """

    wanted: ClassVar[str] = "complete group"
    """Name of the requested thing, for messages."""

    def __init__(self, urls: Sequence[str], api_key: str | None, *, cfg: RequestLimits, backoff_s: float = 0.5) -> None:
        super().__init__()
        self._limits, self._api_key, self._backoff_s = cfg, api_key, backoff_s
        self._servers = self._balance(urls)
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None
        self._reader: AnswerReader | None = None
        self._starts = Starts()
        self._has_said_lack = False

    @property
    def servers(self) -> LeastLoaded:
        """The servers that get requests now. Used by the event loop alone."""
        return self._servers

    async def __aenter__(self: T_Client) -> T_Client:
        self._reset_counts()
        self._has_said_lack = False
        self._slots = asyncio.Semaphore(self._limits.max_in_flight)
        self._reader, self._starts = AnswerReader(), Starts()
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,  # a small answer must not become a huge one
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        assert self._reader is not None
        await self._session.close()
        self._reader.close()
        self._session = self._slots = self._reader = None

    async def exchange(
        self, path: str, make_body: Callable[[], bytes], *, max_bytes: int, parse: Callable[[str, Answer], T]
    ) -> T:
        """POST a body until an answer is usable; return the result of ``parse``.

        Args:
            path: path on the chosen server.
            make_body: called once, when the request may begin: many bodies take time and memory.
            max_bytes: a longer answer is cut off.
            parse: (URL of the server, answer) → the result; it raises :class:`AskError` for an unusable answer. A
                large answer is parsed in a thread, one at a time.

        Raises:
            GroupDroppedError: all retries failed, or the deadline passed; or a server refuses the request for good
                (HTTP 400, 413, 422), for example a prompt beyond its context length.
            NoServerError: no server is left to ask.
        """
        assert self._slots is not None, "use `async with client`"
        assert self._session is not None
        assert self._reader is not None
        async with self._slots:
            await self.turn()
            await self._starts.turn()
            body = make_body()
            attempts = Attempts(
                retries=self._limits.retries,
                deadline_s=self._limits.request_deadline_s,
                backoff_s=self._backoff_s,
                ends_at=running_time() + self._limits.request_deadline_s,
                wanted=self.wanted,
            )
            while True:
                # Keep this value: a failure must not count against servers that a later refit names again.
                servers = self.servers
                with servers.server() as url:
                    try:
                        answer = await ask(
                            self._session,
                            f"{url}{path}",
                            body,
                            timeout_s=attempts.left_s(),
                            max_bytes=max_bytes,
                            api_key=self._api_key,
                            taking=self._reader.taking,
                        )
                        return await self._reader.read(answer.num_bytes, functools.partial(_parsed, parse, url, answer))
                    except AskError as error:
                        attempts.left_s()  # after the deadline the server is not at fault
                        pause_s = attempts.pause_after(self.blame(error, url, servers))
                        self.retries += not isinstance(error, OwnLackError)
                await asyncio.sleep(pause_s)
                await self.turn()
                await self._starts.turn()

    async def turn(self) -> None:
        """Wait until an attempt may begin: at once, unless a subclass limits their rate."""

    def _balance(self, urls: Sequence[str]) -> LeastLoaded:
        return LeastLoaded(urls, rest_s=4 * self._backoff_s, clock=time.monotonic)

    def blame(self, error: AskError, url: str, servers: LeastLoaded) -> AskError:
        """Send the next requests elsewhere if the server is at fault; return the failure to count."""
        if isinstance(error, OwnLackError):
            if not self._has_said_lack:
                _log.warning("this host cannot open another connection; requests wait for others: %s", error)
            self._has_said_lack = True
        elif isinstance(error, LostServerError):
            if servers.leave_out(url):
                _log.warning("no more requests to %s: %s", url, error)
        elif isinstance(error, AttemptError | BusyError):
            warn_often(_log, "an attempt for a group failed: %s", error)
            servers.failed(url)
        return error


def _parsed(parse: Callable[[str, Answer], T], url: str, answer: Answer) -> T:
    """Return the result of ``parse``. The answer is freed in the thread that reads it: it may have 100 MB, which take
    10 to 20 ms."""
    try:
        return parse(url, answer)
    finally:
        answer.free()
