"""Async client of a teacher's servers: rollouts in, log-probs of their tokens out."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from types import TracebackType

import aiohttp

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import Answer, AskError, AttemptError, LostServerError, ask, without_key
from megatron_dypo.rollout.attempts import Attempts, GroupDroppedError
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.teacher.formats import BadAnswerError, format_of, most_bytes
from megatron_dypo.types import Floats, Tokens

_log = logging.getLogger(__name__)


class NoLogprobsError(Exception):
    """The teacher gave no log-probs of a rollout, and will not be asked for them again."""


class TeacherClient:
    """Asks one or several servers of one teacher model.

    A server that fails rests for a while; one that is down is asked again, since nobody names it anew as a refit names
    the policy's servers. Use it as an async context manager. No proxy of the environment is used.

    Args:
        cfg: the servers and the limits: ``max_in_flight`` requests at once, ``request_deadline_s`` for a rollout from
            its first attempt to its last, ``retries`` attempts after the first.
        api_key: sent as a bearer token, and shown in no message; None: none is.
        vocab_size: one more than the largest id of the policy's tokenizer.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
    """

    def __init__(
        self, cfg: TeacherServersConfig, api_key: str | None, *, vocab_size: int, backoff_s: float = 0.5
    ) -> None:
        self._cfg, self._api_key, self._backoff_s = cfg, api_key, backoff_s
        self._format = format_of(cfg, vocab_size)
        self._servers = LeastLoaded(cfg.urls, rest_s=4 * backoff_s, clock=time.monotonic)
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None

    async def __aenter__(self) -> TeacherClient:
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

    async def logprobs(self, prompt: Tokens, response: Tokens) -> Floats:
        """Return the teacher's [R] log-probs of ``response`` after ``prompt``, at temperature 1.

        Raises:
            NoLogprobsError: no sound answer after all retries or at the deadline, or a server refuses the request for
                good, such as a sequence beyond its context length.
        """
        assert self._slots is not None, "use `async with client`"
        body = json.dumps(self._format.request(prompt, response)).encode()
        async with self._slots:
            attempts = Attempts(
                retries=self._cfg.retries,
                deadline_s=self._cfg.request_deadline_s,
                backoff_s=self._backoff_s,
                ends_at=time.monotonic() + self._cfg.request_deadline_s,
                wanted="teacher's log-probs",
            )
            try:
                while True:
                    try:
                        return await self._attempt(prompt, response, body, attempts)
                    except AskError as error:
                        await asyncio.sleep(attempts.pause_after(error))
            except GroupDroppedError as error:
                raise NoLogprobsError(str(error)) from error

    async def _attempt(self, prompt: Tokens, response: Tokens, body: bytes, attempts: Attempts) -> Floats:
        """Ask one server once. Raises AskError, or GroupDroppedError past the deadline."""
        assert self._session is not None
        with self._servers.server() as url:
            try:
                answer = await ask(
                    self._session,
                    f"{url}{self._format.path}",
                    body,
                    timeout_s=attempts.left_s(),
                    max_bytes=most_bytes(len(prompt) + len(response)),
                    api_key=self._api_key,
                )
                return self._read(answer, prompt, response)
            except (AttemptError, LostServerError) as error:
                attempts.left_s()  # past the deadline no server is to blame
                warn_often(_log, "an attempt for a teacher's log-probs failed: %s", error)
                self._servers.failed(url)
                raise AttemptError(str(error)) from error

    def _read(self, answer: Answer, prompt: Tokens, response: Tokens) -> Floats:
        try:
            return self._format.read(answer.payload, prompt, response)
        except BadAnswerError as error:
            raise AttemptError(without_key(f"{error}; {answer.shown}", self._api_key)) from error
