"""Async client of a teacher's servers: rollouts in, log-probs of their tokens out."""

from __future__ import annotations

import functools
import json
import logging

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import Answer, AskError, AttemptError, LostServerError, without_key
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.http_client import HttpClient
from megatron_dypo.rollout.teacher.formats import BadAnswerError, format_of, most_bytes
from megatron_dypo.types import Floats, Tokens

_log = logging.getLogger(__name__)


class NoLogprobsError(Exception):
    """The teacher gave no log-probs of a rollout, and will not be asked again."""


class TeacherClient(HttpClient):
    """Asks one or several servers of one teacher model.

    A server that fails rests for a while. A server that is down is asked again later, since no refit tells when it is
    back. Use it as an async context manager. Proxies of the environment are not used.

    Args:
        cfg: the servers and the limits: ``max_in_flight`` requests at once, ``request_deadline_s`` for a rollout from
            its first attempt to its last, ``retries`` attempts after the first.
        api_key: sent as a bearer token, and never shown in a message. None: no key is sent.
        vocab_size: one more than the largest id of the policy's tokenizer.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
    """

    wanted = "teacher's log-probs"

    def __init__(
        self, cfg: TeacherServersConfig, api_key: str | None, *, vocab_size: int, backoff_s: float = 0.5
    ) -> None:
        super().__init__(cfg.urls, api_key, cfg=cfg, backoff_s=backoff_s)
        self._format = format_of(cfg, vocab_size)

    async def logprobs(self, prompt: Tokens, response: Tokens) -> Floats:
        """Return the teacher's [R] log-probs of ``response`` after ``prompt``, at temperature 1.

        Raises:
            NoLogprobsError: no valid answer after all retries or at the deadline, or a server refuses the request for
                good, for example a sequence beyond its context length.
        """
        limit = most_bytes(len(prompt) + len(response))
        read = functools.partial(self._read, prompt, response)
        try:
            body = functools.partial(self._body, prompt, response)
            return await self.exchange(self._format.path, body, max_bytes=limit, parse=read)
        except GroupDroppedError as error:
            raise NoLogprobsError(str(error)) from error

    def blame(self, error: AskError, url: str, servers: LeastLoaded) -> AskError:
        """Let a server rest if it failed or is down. Here a server that is down costs an attempt too."""
        if not isinstance(error, AttemptError | LostServerError):
            return super().blame(error, url, servers)
        warn_often(_log, "an attempt for a teacher's log-probs failed: %s", error)
        servers.failed(url)
        return AttemptError(str(error))

    def _body(self, prompt: Tokens, response: Tokens) -> bytes:
        return json.dumps(self._format.request(prompt, response)).encode()

    def _read(self, prompt: Tokens, response: Tokens, _url: str, answer: Answer) -> Floats:
        try:
            return self._format.read(answer.payload, prompt, response)
        except BadAnswerError as error:
            raise AttemptError(without_key(f"{error}; {answer.shown}", self._api_key)) from error
