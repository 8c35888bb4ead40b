"""Async client of SGLang's native ``/generate``: tokens in, groups of rollouts out."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import aiohttp

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import (
    Answer,
    AskError,
    AttemptError,
    LostServerError,
    OwnLackError,
    RefusedError,
    ask,
    without_key,
)
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.counts import AttemptCounts
from megatron_dypo.rollout.responses import (
    IncompleteGroupError,
    Sampling,
    WrongVersionError,
    parse_group,
    request_body,
)
from megatron_dypo.types import DropReason, Rollout, Tokens
from megatron_dypo.words import counted

_WATCH_EVERY_S = 1.0
_MAX_BACKOFF_S = 30.0
_FIRST_LACK_S = 0.05
_MAX_LACK_S = 1.0

_log = logging.getLogger(__name__)


class GroupDroppedError(Exception):
    """The group cannot be had: it stayed incomplete, or a server refuses its prompt."""

    def __init__(self, message: str, reason: DropReason = DropReason.INCOMPLETE) -> None:
        super().__init__(message)
        self.reason = reason
        """``REFUSED``: by a server, for good. ``INCOMPLETE``: after all retries, or at the deadline."""


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The servers that get requests and the versions whose answers count, as one value of one refit.

    The trainer's thread replaces it while the event loop reads it, so that the two never see half of a change.
    """

    servers: LeastLoaded
    """Used by the event loop alone."""
    versions: Sequence[int] | None
    """A group counts only if one of these versions sampled its newest token. They ascend. None: any version."""


@dataclass(kw_only=True)
class _Request:
    """One group to be sampled, from its first attempt to its last."""

    body: bytes
    sampling: Sampling
    ends_at: float
    """Deadline of the group on the monotonic clock."""
    failures: int = 0
    """Attempts that count against ``rollout.retries``."""
    lacks: int = 0
    """Attempts that this host could not even begin."""
    last_failure: str = "none, no answer came"

    def left_s(self) -> float:
        return self.ends_at - time.monotonic()


class SGLangClient(AttemptCounts):
    """Samples groups from one or several servers, or from one router.

    A server that refuses connections, or serves other weights than it should, gets no more requests until
    :meth:`use_servers` names it again; so does a router that refuses them, or has no server to ask.

    Use it as an async context manager around :meth:`generate`. One request samples a whole group, so that its prompt
    is computed once. A cancelled :meth:`generate` closes its connection, on which SGLang aborts the group's requests.
    No proxy of the environment is used. Any thread may call :meth:`use_servers` and :meth:`accept`.

    Args:
        urls: servers.
        router: gets the requests in place of ``urls``, which are behind it.
        api_key: sent as a bearer token, and shown in no message; None: none is.
        cfg: sampling defaults, and limits: ``max_in_flight`` requests (groups) open at once; ``request_deadline_s``
            for a group from its first attempt to its last; ``retries`` attempts after the first.
        decode: token ids → text of a rollout.
        stop_token_ids: end a response; the matched one is its last token.
        check: raises when the run has lost its servers for good. :meth:`watch` calls it every second in a thread.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
        vocab_size: a response with a token id from there on is refused; None: none is.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        *,
        cfg: RolloutConfig,
        decode: Callable[[Tokens], str],
        stop_token_ids: Sequence[int],
        check: Callable[[], None] | None = None,
        router: str | None = None,
        backoff_s: float = 0.5,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self._cfg, self._decode, self._check = cfg, decode, check
        self._stop_token_ids, self._vocab_size = tuple(stop_token_ids), vocab_size
        self._api_key = api_key
        self._backoff_s = backoff_s
        self._router = router
        self._writing = threading.Lock()
        self.use_servers(urls)
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None
        self._has_said_lack = False

    @property
    def upstream(self) -> Upstream:
        """The servers and versions of now."""
        return self._upstream

    def use_servers(self, urls: Sequence[str], versions: Sequence[int] | None = None) -> None:
        """Send future requests to ``urls``, and accept only groups that one of ``versions`` sampled; None: any."""
        targets = [self._router] if self._router is not None else urls
        servers = LeastLoaded(targets, rest_s=4 * self._backoff_s, clock=time.monotonic)
        with self._writing:
            self._upstream = Upstream(servers=servers, versions=versions)

    def accept(self, versions: Sequence[int] | None) -> None:
        """Accept only groups whose newest token one of these versions sampled, whichever server sent them; None: any.

        ``versions`` ascend: those that servers may hold now, that of the last refit last.
        """
        with self._writing:
            self._upstream = replace(self._upstream, versions=versions)

    def sampling(self, n: int, *, temperature: float | None = None, max_new_tokens: int | None = None) -> Sampling:
        """Return the configured sampling with ``n`` rollouts per prompt and these overrides (evaluation has its own)."""
        return Sampling(
            n=n,
            temperature=self._cfg.temperature if temperature is None else temperature,
            max_new_tokens=self._cfg.max_new_tokens if max_new_tokens is None else max_new_tokens,
            top_p=self._cfg.top_p,
            top_k=self._cfg.top_k,
            stop_token_ids=self._stop_token_ids,
        )

    async def __aenter__(self) -> SGLangClient:
        self._reset_counts()
        self._has_said_lack = False
        self._slots = asyncio.Semaphore(self._cfg.max_in_flight)
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
        await self._session.close()
        self._session = self._slots = None

    async def generate(self, prompt_tokens: Tokens, sampling: Sampling) -> tuple[Rollout, ...]:
        """Sample one group: all ``sampling.n`` rollouts, or an error; never a part of them.

        Raises:
            GroupDroppedError: the group stayed incomplete after all retries, or missed its deadline; or a server
                refuses the request for good (HTTP 400, 413, 422), such as a prompt beyond its context length.
            NoServerError: no server is left to ask.
        """
        assert self._slots is not None, "use `async with client`"
        assert self._session is not None
        body = json.dumps(request_body(prompt_tokens, sampling)).encode()
        async with self._slots:
            ends_at = time.monotonic() + self._cfg.request_deadline_s
            request = _Request(body=body, sampling=sampling, ends_at=ends_at)
            while True:
                # The servers of now: a failure here says nothing of a server that a later refit names again.
                servers = self._upstream.servers
                with servers.server() as url:
                    try:
                        answer = await ask(
                            self._session,
                            f"{url}/generate",
                            body,
                            timeout_s=self._time_left(request),
                            max_bytes=sampling.max_answer_bytes,
                            api_key=self._api_key,
                        )
                        return self._parse(url, request, answer)
                    except AskError as error:
                        pause_s = self._pause_after(error, request, url, servers)
                await asyncio.sleep(min(pause_s, max(0.0, request.left_s())))

    async def watch(self) -> None:
        """Run ``check`` every second until this is cancelled; await it beside :meth:`generate`.

        The check runs in a thread: it may read a log or start a process. Every second, since it has no event.
        """
        while True:
            if self._check is not None:
                await asyncio.to_thread(self._check)
            await asyncio.sleep(_WATCH_EVERY_S)

    def _time_left(self, request: _Request) -> float:
        left_s = request.left_s()
        if left_s <= 0:
            limit = f"request_deadline_s={self._cfg.request_deadline_s:g}"
            raise GroupDroppedError(f"no complete group after {limit}; last failure: {request.last_failure}")
        return left_s

    def _pause_after(self, error: AskError, request: _Request, url: str, servers: LeastLoaded) -> float:
        """Note a failed attempt and return how many seconds to wait before the next.

        Raises:
            GroupDroppedError: there is no next attempt.
        """
        if isinstance(error, RefusedError):
            raise GroupDroppedError(str(error), DropReason.REFUSED) from error
        self._time_left(request)
        request.last_failure = str(error)
        if isinstance(error, OwnLackError):
            # Other requests end and leave room; the servers are well, and so is the group.
            if not self._has_said_lack:
                _log.warning("this host cannot open another connection; requests wait for others: %s", error)
            self._has_said_lack = True
            request.lacks = min(request.lacks + 1, 30)
            return min(_FIRST_LACK_S * 2 ** (request.lacks - 1), _MAX_LACK_S) * random.uniform(0.5, 1.0)
        if isinstance(error, LostServerError):
            if servers.leave_out(url):
                _log.warning("no more requests to %s until the next push: %s", url, error)
            self.retries += 1
            return 0.0  # elsewhere at once, and not at the cost of the attempts
        servers.failed(url)
        request.failures += 1
        if request.failures > self._cfg.retries:
            raise GroupDroppedError(f"{counted(request.failures, 'attempt')} failed, the last: {error}") from error
        warn_often(_log, "attempt %d for a group failed, trying again: %s", request.failures, error)
        self.retries += 1
        return min(self._backoff_s * 2 ** min(request.failures - 1, 30), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)

    def _parse(self, url: str, request: _Request, answer: Answer) -> tuple[Rollout, ...]:
        sampling = request.sampling
        try:
            return parse_group(
                answer.payload, sampling, self._decode, versions=self._upstream.versions, vocab_size=self._vocab_size
            )
        except IncompleteGroupError as error:
            self._count_dropped(answer.payload)
            raise AttemptError(without_key(f"{error}; {answer.shown}", self._api_key)) from error
        except WrongVersionError as error:
            self._count_dropped(answer.payload)
            self.wrong_versions += sampling.n
            message = without_key(str(error), self._api_key)
            warn_often(_log, "dropped %d rollouts of %s: %s", sampling.n, url, message)
            kind = LostServerError if self._router is None else AttemptError  # a router has other servers to ask
            raise kind(f"{url}: {message}") from error
