"""Async client of SGLang's native ``/generate``: tokens in, groups of rollouts out."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import aiohttp

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.words import counted
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import (
    Answer,
    AskError,
    AttemptError,
    LostServerError,
    OwnLackError,
    ask,
    without_key,
)
from megatron_dypo.rollout.attempts import Attempts
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.counts import AttemptCounts
from megatron_dypo.rollout.responses import IncompleteGroupError, WrongVersionError, parse_group
from megatron_dypo.rollout.sampling import Sampling, request_body
from megatron_dypo.types import Rollout, Tokens

_WATCH_EVERY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The servers that get requests and the versions whose answers count, as one value of one refit.

    The trainer's thread replaces it while the event loop reads it, so that the two never see half of a change.
    """

    servers: LeastLoaded
    """Used by the event loop alone."""
    versions: Sequence[int] | None
    """A group counts only if one of these versions sampled its newest token. They ascend. None: any version."""


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
        """The current servers and versions."""
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
        """Return the configured sampling with ``n`` rollouts per prompt and evaluation's own overrides."""
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
            attempts = Attempts(
                retries=self._cfg.retries,
                deadline_s=self._cfg.request_deadline_s,
                backoff_s=self._backoff_s,
                ends_at=time.monotonic() + self._cfg.request_deadline_s,
            )
            while True:
                # The servers of now: a failure here says nothing of a server that a later refit names again.
                servers = self._upstream.servers
                with servers.server() as url:
                    try:
                        answer = await ask(
                            self._session,
                            f"{url}/generate",
                            body,
                            timeout_s=attempts.left_s(),
                            max_bytes=sampling.max_answer_bytes,
                            api_key=self._api_key,
                        )
                        return self._parse(url, sampling, answer)
                    except AskError as error:
                        attempts.left_s()  # past the deadline no server is to blame
                        self._blame(error, url, servers)
                        pause_s = attempts.pause_after(error)
                        self.retries += not isinstance(error, OwnLackError)
                await asyncio.sleep(pause_s)

    @property
    def watch_turn_s(self) -> float:
        """Seconds within which :meth:`watch` certainly runs the check once; 0 without a check."""
        return 0.0 if self._check is None else 1.5 * _WATCH_EVERY_S

    async def watch(self) -> None:
        """Run ``check`` every second until this is cancelled; await it beside :meth:`generate`.

        The check runs in a thread: it may read a log or start a process. Every second, since it has no event.
        """
        while True:
            if self._check is not None:
                await asyncio.to_thread(self._check)
            await asyncio.sleep(_WATCH_EVERY_S)

    def _blame(self, error: AskError, url: str, servers: LeastLoaded) -> None:
        """Send the next requests elsewhere if the server is to blame for a failure."""
        if isinstance(error, OwnLackError):
            if not self._has_said_lack:
                _log.warning("this host cannot open another connection; requests wait for others: %s", error)
            self._has_said_lack = True
        elif isinstance(error, LostServerError):
            if servers.leave_out(url):
                _log.warning("no more requests to %s until the next refit: %s", url, error)
        elif isinstance(error, AttemptError):
            warn_often(_log, "an attempt for a group failed: %s", error)
            servers.failed(url)

    def _parse(self, url: str, sampling: Sampling, answer: Answer) -> tuple[Rollout, ...]:
        try:
            return parse_group(
                answer.payload, sampling, self._decode, versions=self._upstream.versions, vocab_size=self._vocab_size
            )
        except IncompleteGroupError as error:
            self.count_dropped(answer.payload)
            raise AttemptError(without_key(f"{error}; {answer.shown}", self._api_key)) from error
        except WrongVersionError as error:
            self.count_dropped(answer.payload)
            self.wrong_versions += sampling.n
            message = without_key(str(error), self._api_key)
            warn_often(_log, "dropped %s of %s: %s", counted(sampling.n, "rollout"), url, message)
            kind = LostServerError if self._router is None else AttemptError  # a router has other servers to ask
            raise kind(f"{url}: {message}") from error
