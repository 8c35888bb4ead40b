"""Async client of SGLang's native ``/generate``: tokens in, groups of rollouts out."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import (
    Answer,
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

_CONNECT_S = 10.0
_WATCH_EVERY_S = 1.0
_MAX_BACKOFF_S = 30.0
_FIRST_LACK_S = 0.05
_MAX_LACK_S = 1.0

_log = logging.getLogger(__name__)


class GroupDroppedError(Exception):
    """A group that there will not be: it stayed incomplete, or a server refuses its prompt."""

    def __init__(self, message: str, reason: DropReason = DropReason.INCOMPLETE) -> None:
        super().__init__(message)
        self.reason = reason
        """``REFUSED``: by a server, for good. ``INCOMPLETE``: after all retries, or at the deadline."""


@dataclass(kw_only=True)
class _Request:
    """One group to be sampled."""

    body: bytes
    sampling: Sampling
    last_failure: str = "none, no answer came"


class SGLangClient(AttemptCounts):
    """Samples groups from one or several servers, or from one router.

    A server that refuses connections, or serves other weights than it should, gets no more requests until
    :meth:`serve` names it again; so does a router that refuses them, or has no server to ask.

    Use it as an async context manager around :meth:`generate`. One request samples a whole group, so that its prompt
    is computed once. A cancelled :meth:`generate` closes its connection, on which SGLang aborts the group's requests.
    No proxy of the environment is used.

    Args:
        urls: servers.
        router: gets the requests in place of ``urls``, which are behind it.
        api_key: sent as a bearer token, and shown in no message; None: none is.
        cfg: sampling defaults, and limits: ``max_in_flight`` requests (groups) open at once; ``request_deadline_s``
            for a group from its first attempt to its last; ``retries`` attempts after the first.
        decode: token ids → text of a rollout.
        stop_token_ids: end a response; the matched one is its last token.
        check: raises when the run has lost its servers for good; called every second by :meth:`watch`.
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
        self.serve(urls)
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None
        self._has_said_lack = False

    def serve(self, urls: Sequence[str], versions: Sequence[int] | None = None) -> None:
        """Send future requests to ``urls``, and :meth:`accept` groups of these ``versions``."""
        targets = [self._router] if self._router is not None else urls
        self._servers = LeastLoaded(targets, rest_s=4 * self._backoff_s, clock=time.monotonic)
        self.accept(versions)

    def accept(self, versions: Sequence[int] | None) -> None:
        """Take only groups whose newest token one of these versions sampled, wherever they come from; None: any.

        ``versions`` ascend: what servers may hold now, the last push's version last.
        """
        self._versions = versions

    def sampling(self, n: int, *, temperature: float | None = None, max_new_tokens: int | None = None) -> Sampling:
        """The configured sampling with ``n`` rollouts a prompt and the given overrides (evaluation has its own)."""
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
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
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
        request = _Request(body=json.dumps(request_body(prompt_tokens, sampling)).encode(), sampling=sampling)
        async with self._slots:
            try:
                return await asyncio.wait_for(self._attempts(request), self._cfg.request_deadline_s)
            except asyncio.TimeoutError as error:
                limit = f"request_deadline_s={self._cfg.request_deadline_s:g}"
                message = f"no complete group after {limit}; last failure: {request.last_failure}"
                raise GroupDroppedError(message) from error

    async def watch(self) -> None:
        """Run ``check`` every second until it is cancelled; to be awaited beside :meth:`generate`."""
        while True:
            if self._check is not None:
                self._check()
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _attempts(self, request: _Request) -> tuple[Rollout, ...]:
        attempt = lacks = 0
        while True:
            try:
                return await self._attempt(request)
            except RefusedError as error:
                raise GroupDroppedError(str(error), DropReason.REFUSED) from error
            except LostServerError as error:
                request.last_failure = str(error)
                self.retries += 1  # elsewhere at once, and not at the cost of the attempts
                continue
            except OwnLackError as error:
                # Others' requests end and leave room; the servers are well, and so is the group.
                request.last_failure = str(error)
                if not self._has_said_lack:
                    _log.warning("this host cannot open another connection; requests wait for others: %s", error)
                self._has_said_lack = True
                await asyncio.sleep(min(_FIRST_LACK_S * 2**lacks, _MAX_LACK_S) * random.uniform(0.5, 1.0))
                lacks = min(lacks + 1, 30)
                continue
            except AttemptError as error:
                request.last_failure = str(error)
            if attempt == self._cfg.retries:
                raise GroupDroppedError(f"{attempt + 1} attempts failed, the last: {request.last_failure}")
            attempt += 1
            warn_often(_log, "attempt %d for a group failed, trying again: %s", attempt, request.last_failure)
            self.retries += 1
            backoff_s = min(self._backoff_s * 2 ** min(attempt - 1, 30), _MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _attempt(self, request: _Request) -> tuple[Rollout, ...]:
        servers = self._servers  # those of now: what fails here says nothing of a server that a later push names anew
        with servers.server() as url:
            try:
                return self._parse(url, request, await self._post(url, request))
            except AttemptError:
                servers.failed(url)
                raise
            except LostServerError as error:
                if servers.leave_out(url):
                    _log.warning("no more requests to %s until the next push: %s", url, error)
                raise

    def _parse(self, url: str, request: _Request, answer: Answer) -> tuple[Rollout, ...]:
        sampling = request.sampling
        try:
            return parse_group(
                answer.payload, sampling, self._decode, versions=self._versions, vocab_size=self._vocab_size
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

    async def _post(self, url: str, request: _Request) -> Any:
        assert self._session is not None
        max_bytes = request.sampling.max_answer_bytes
        return await ask(self._session, f"{url}/generate", request.body, max_bytes=max_bytes, api_key=self._api_key)
