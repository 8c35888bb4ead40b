"""Async client of SGLang's native ``/generate``: tokens in, groups of rollouts out."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.responses import (
    IncompleteGroupError,
    Sampling,
    WrongVersionError,
    parse_group,
    request_body,
)
from megatron_dypo.rollout.router import NO_SERVER
from megatron_dypo.types import DropReason, Rollout, Tokens

_CONNECT_S = 10.0
_WATCH_EVERY_S = 1.0
_MAX_BACKOFF_S = 30.0

_log = logging.getLogger(__name__)


class GroupDroppedError(Exception):
    """A prompt has no group: it stayed incomplete, or a server refused the request for good."""

    def __init__(self, message: str, reason: DropReason = DropReason.INCOMPLETE) -> None:
        super().__init__(message)
        self.reason = reason


class _AttemptError(Exception):
    """An attempt that is worth another."""


class _LostServerError(Exception):
    """An attempt failed because its server has gone, or serves other weights."""


class SGLangClient:
    """Samples groups from one or several servers, or from one router.

    A server that refuses connections, or serves other weights than it should, gets no more requests until
    :meth:`serve` names it again; so does a router that refuses them, or has no server to ask.

    Use it as an async context manager around :meth:`generate`. One request samples a whole group, so that its prompt
    is computed once. A cancelled :meth:`generate` closes its connection, on which SGLang aborts the group's requests:
    they have no ids of ours that ``/abort_request`` could name.

    Args:
        urls: servers.
        router: gets the requests in place of ``urls``, which are behind it.
        api_key: sent as a bearer token; None: none is.
        cfg: sampling defaults, and limits: ``max_in_flight`` requests (groups) open at once; ``request_deadline_s``
            for a group from its first attempt to its last; ``retries`` attempts after the first.
        decode: token ids → text of a rollout.
        stop_token_ids: end a response; the matched one is its last token.
        check: raises when the run has lost its servers for good; called every second by :meth:`watch`.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
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
    ) -> None:
        self._cfg, self._decode, self._check = cfg, decode, check
        self._stop_token_ids = tuple(stop_token_ids)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._backoff_s = backoff_s
        self._router = router
        self.serve(urls)
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None
        self.retries = 0
        """Attempts after the first, over all groups, since the context was entered."""
        self.wrong_versions = 0
        """Rollouts dropped because other weights than those of the last push sampled them; since the context was entered."""

    def serve(self, urls: Sequence[str], versions: range | None = None) -> None:
        """Send the requests to come to these servers, and :meth:`accept` what weights of these versions end."""
        targets = [self._router] if self._router is not None else urls
        self._servers = LeastLoaded(targets, rest_s=4 * self._backoff_s, clock=time.monotonic)
        self.accept(versions)

    def accept(self, versions: range | None) -> None:
        """Take only responses that weights of these versions end, wherever they come from; None: of any."""
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
        self.retries = self.wrong_versions = 0
        self._slots = asyncio.Semaphore(self._cfg.max_in_flight)
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            connector=aiohttp.TCPConnector(limit=0),
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
            GroupDroppedError: the group stayed incomplete after all retries, or missed its deadline.
            NoServerError: no server is left to ask.
            ValueError: a server refuses the request for good (HTTP 4xx), such as a prompt beyond its context length.
        """
        assert self._slots is not None, "use `async with client`"
        async with self._slots:
            try:
                return await asyncio.wait_for(self._attempts(prompt_tokens, sampling), self._cfg.request_deadline_s)
            except asyncio.TimeoutError as error:
                reason = f"no complete group after request_deadline_s={self._cfg.request_deadline_s:g}"
                raise GroupDroppedError(reason) from error

    async def watch(self) -> None:
        """Run ``check`` every second, for ever; to be awaited beside :meth:`generate`, and cancelled."""
        while True:
            if self._check is not None:
                self._check()
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _attempts(self, prompt_tokens: Tokens, sampling: Sampling) -> tuple[Rollout, ...]:
        body = json.dumps(request_body(prompt_tokens, sampling)).encode()
        attempt = 0
        while True:
            try:
                return await self._attempt(body, sampling.n)
            except _LostServerError:
                self.retries += 1  # elsewhere at once, and not at the cost of the attempts
                continue
            except _AttemptError as error:
                reason = str(error)
            if attempt == self._cfg.retries:
                raise GroupDroppedError(f"{attempt + 1} attempts failed, the last: {reason}")
            attempt += 1
            _log.warning("attempt %d for a group failed, trying again: %s", attempt, reason)
            self.retries += 1
            backoff_s = min(self._backoff_s * 2 ** (attempt - 1), _MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _attempt(self, body: bytes, n: int) -> tuple[Rollout, ...]:
        with self._servers.server() as url:
            try:
                payload = await self._post(url, body)
            except _AttemptError:
                self._servers.failed(url)
                raise
        try:
            return parse_group(payload, n, self._decode, versions=self._versions)
        except IncompleteGroupError as error:
            raise _AttemptError(f"{url}: {error}") from error
        except WrongVersionError as error:
            self.wrong_versions += n
            _log.warning("dropped %d rollouts of %s: %s", n, url, error)
            if self._router is not None:
                raise _AttemptError(f"{url}: {error}") from error
            raise self._lost(url, str(error)) from error

    async def _post(self, url: str, body: bytes) -> Any:
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(f"{url}/generate", data=body, headers=headers) as response:
                text = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise self._lost(url, str(error)) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _AttemptError(f"{url}: {error!r}") from error
        message = f"{url}: HTTP {response.status}: {text[:500].decode(errors='replace')}"
        if response.headers.get(NO_SERVER[0]) == NO_SERVER[1]:
            raise self._lost(url, message)
        if response.status == 429 or response.status >= 500:
            raise _AttemptError(message)
        if response.status != 200:
            raise ValueError(message)
        return json.loads(text)

    def _lost(self, url: str, reason: str) -> _LostServerError:
        """Send nothing more to a server."""
        if self._servers.leave_out(url):
            _log.warning("no more requests to %s until the next push: %s", url, reason)
        return _LostServerError(reason)
