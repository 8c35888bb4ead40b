"""Send requests to one teacher: limit their rate, pause if its server asks for it, and report a refused key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ClassVar

from megatron_dypo.config.evaluation import SetSettings
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.eval.endpoints import OpenAIEndpoint
from megatron_dypo.eval.reaching import reach_openai
from megatron_dypo.rollout.ask import AskError, BusyError, KeyRefusedError
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.http_client import HttpClient
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.traces.config import TeacherConfig


class TeacherFailedError(Exception):
    """The failure of one teacher: it gives no usable response. Other teachers may go on."""


class Turns:
    """The times at which attempts may begin: at most ``per_s`` per second, evenly spaced, and none during a pause."""

    def __init__(self, per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap_s = 0.0 if per_s is None else 1 / per_s
        self._clock = clock
        self._next = self._held_until = clock()

    def reserve(self) -> float:
        """Take the next turn; return the seconds until it begins."""
        now = self._clock()
        turn = max(now, self._next, self._held_until)
        self._next = turn + self._gap_s
        return turn - now

    def hold(self, seconds: float) -> None:
        """Begin a pause: no turn comes before its end."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    @property
    def is_held(self) -> bool:
        """Tell whether a pause is on. A turn that was taken before the pause must be taken again."""
        return self._clock() < self._held_until


class TeacherClient(HttpClient):
    """The client of one teacher's servers."""

    wanted: ClassVar[str] = "response"

    def __init__(self, urls: tuple[str, ...], api_key: str | None, *, cfg: TeacherConfig) -> None:
        super().__init__(urls, api_key, cfg=cfg)
        self._key_name, self._longest_pause_s = cfg.api_key_env, cfg.request_deadline_s
        self._turns = Turns(cfg.requests_per_s)

    async def turn(self) -> None:
        """Wait for a turn."""
        while (wait_s := self._turns.reserve()) > 0:
            await asyncio.sleep(wait_s)
            if not self._turns.is_held:
                return

    def blame(self, error: AskError, url: str, servers: LeastLoaded) -> AskError:
        """Treat a failure as :class:`HttpClient` does; in addition, pause all requests if the server asks for it.

        Raises:
            TeacherFailedError: the key is refused, or the pause is longer than a response may take.
        """
        if isinstance(error, KeyRefusedError):
            key = f"set {self._key_name} to a valid key" if self._key_name else "set api_key_env and the key"
            raise TeacherFailedError(f"{error}: {key}") from error
        if isinstance(error, BusyError):
            if error.retry_after_s > self._longest_pause_s:
                limit = f"request_deadline_s={self._longest_pause_s:g}"
                raise TeacherFailedError(f"{error}: asks for a pause of {error.retry_after_s:.0f} s, over {limit}")
            self._turns.hold(error.retry_after_s)
        return super().blame(error, url, servers)


def open_endpoint(name: str, cfg: TeacherConfig) -> OpenAIEndpoint:
    """Check that a teacher's endpoint answers, and return the endpoint.

    Raises:
        ValueError: nothing answers, the key is refused or missing, or another model is served.
    """
    api_key = read_api_key(cfg.api_key_env) if cfg.api_key_env is not None else None
    if cfg.api_key_env is not None and api_key is None:
        raise ValueError(f"the environment variable {cfg.api_key_env} is not set: it must hold the API key")
    key_name = cfg.api_key_env or "api_key_env"
    hosts, base = reach_openai(cfg.urls, model=cfg.model, api_key=api_key, key_name=key_name)
    own = SetSettings(
        path="",
        format=None,
        verifier=None,
        samples_per_prompt=cfg.samples,
        temperature=cfg.temperature,
        max_prompts=None,
        shuffle_options=False,
    )
    return OpenAIEndpoint(
        TeacherClient(hosts, api_key, cfg=cfg),
        base=base,
        model=cfg.model,
        api=cfg.api,
        rollout=RolloutConfig(max_new_tokens=cfg.max_tokens, top_p=cfg.top_p, top_k=cfg.top_k),
        settings={name: own},
        extra=cfg.extra,
    )
