"""Async client of SGLang's own ``/generate``: tokens in, groups of rollouts out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.words import counted
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.ask import Answer, AttemptError, LostServerError, without_key
from megatron_dypo.rollout.balance import LeastLoaded
from megatron_dypo.rollout.http_client import HttpClient
from megatron_dypo.rollout.responses import IncompleteGroupError, WrongVersionError, parse_group
from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.rollout.sampling import Sampling, request_body
from megatron_dypo.types import Rollout, Tokens

_WATCH_EVERY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The servers that get requests, and the versions whose answers count, as set by one refit.

    The trainer's thread replaces the whole value while the event loop reads it, so the loop never sees half of a
    change.
    """

    servers: LeastLoaded
    """Used by the event loop alone."""
    versions: Sequence[int] | None
    """A group counts only if one of these versions sampled its newest token. Ascending. None: any version."""


class SGLangClient(HttpClient):
    """Samples groups from one or several servers, or from one router.

    A server that refuses connections or serves wrong weights gets no more requests until :meth:`use_servers` names it
    again. The same holds for a router that refuses connections or has no server.

    Use it as an async context manager around :meth:`generate`. One request samples a whole group, so the server
    computes the prompt once. If :meth:`generate` is cancelled, it closes its connection, and SGLang aborts the group's
    requests. Proxies of the environment are not used. Any thread may call :meth:`use_servers` and :meth:`accept`.

    Args:
        urls: servers.
        router: gets the requests in place of ``urls``, which are behind it.
        api_key: sent as a bearer token, and never shown in a message. None: no key is sent.
        cfg: sampling defaults, and limits: ``max_in_flight`` requests (groups) open at once; ``request_deadline_s``
            for a group from its first attempt to its last; ``retries`` attempts after the first.
        decode: token ids → text of a rollout.
        stop_token_ids: tokens that end a response; the matched one is its last token.
        check: raises when the run has lost its servers for good. :meth:`watch` calls it every second in a thread.
        backoff_s: wait before the first retry; doubles each time, with jitter, up to 30 s.
        vocab_size: a response with a token id at or above it is refused. None: no limit.
        routes: sizes of the choice of experts that training samples bring (``objective.replay: rollout``); None: they
            bring none.
        run_seed: the run's seed, if the servers honour seeds: rollouts then get seeds that follow from it.
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
        routes: RouteShape | None = None,
        run_seed: int | None = None,
    ) -> None:
        super().__init__(urls if router is None else [router], api_key, cfg=cfg, backoff_s=backoff_s)
        self._cfg, self.decode, self._check = cfg, decode, check
        self._stop_token_ids, self._vocab_size = tuple(stop_token_ids), vocab_size
        self._router, self._routes, self._run_seed = router, routes, run_seed
        self._writing = threading.Lock()
        self.use_servers(urls)

    @property
    def servers(self) -> LeastLoaded:
        """The servers of the last refit."""
        return self._upstream.servers

    @property
    def upstream(self) -> Upstream:
        """The current servers and versions."""
        return self._upstream

    def use_servers(self, urls: Sequence[str], versions: Sequence[int] | None = None) -> None:
        """Send future requests to ``urls``, and accept only groups sampled by one of ``versions``; None: by any."""
        targets = [self._router] if self._router is not None else urls
        servers = self._balance(targets)
        with self._writing:
            self._upstream = Upstream(servers=servers, versions=versions)

    def accept(self, versions: Sequence[int] | None) -> None:
        """Accept only groups, from any server, whose newest token one of ``versions`` sampled; None: any version.

        ``versions`` ascend. They are the versions that servers may hold now; the last one is that of the last refit.
        """
        with self._writing:
            self._upstream = replace(self._upstream, versions=versions)

    def sampling(
        self,
        n: int,
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        with_routes: bool = True,
    ) -> Sampling:
        """Return the configured sampling with ``n`` rollouts per prompt and an evaluation's own values.

        Args:
            seed: seed of the only rollout (``n`` is 1).
            with_routes: ask for the choice of experts, if the client was given its sizes.
        """
        return Sampling(
            n=n,
            temperature=self._cfg.temperature if temperature is None else temperature,
            max_new_tokens=self._cfg.max_new_tokens if max_new_tokens is None else max_new_tokens,
            top_p=self._cfg.top_p,
            top_k=self._cfg.top_k,
            stop_token_ids=self._stop_token_ids,
            seeds=() if seed is None else (seed,),
            run_seed=self._run_seed,
            routes=self._routes if with_routes else None,
        )

    async def generate(self, prompt_tokens: Tokens, sampling: Sampling) -> tuple[Rollout, ...]:
        """Sample one group: return all ``sampling.n`` rollouts, never a part of them.

        Raises:
            GroupDroppedError: the group stayed incomplete after all retries, or missed its deadline; or a server
                refuses the request for good (HTTP 400, 413, 422), for example a prompt beyond its context length.
            NoServerError: no server is left to ask.
        """
        body = functools.partial(_body, prompt_tokens, sampling)
        parse = functools.partial(self._parse, sampling, len(prompt_tokens))
        max_bytes = sampling.max_answer_bytes(len(prompt_tokens))
        return await self.exchange("/generate", body, max_bytes=max_bytes, parse=parse)

    @property
    def watch_turn_s(self) -> float:
        """Seconds within which :meth:`watch` runs the check at least once; 0 without a check."""
        return 0.0 if self._check is None else 1.5 * _WATCH_EVERY_S

    async def watch(self) -> None:
        """Run ``check`` every second until this is cancelled; await it beside :meth:`generate`.

        The check runs in a thread, since it may read a log or start a process. It has no event to wait for.
        """
        while True:
            if self._check is not None:
                await asyncio.to_thread(self._check)
            await asyncio.sleep(_WATCH_EVERY_S)

    def _parse(self, sampling: Sampling, num_prompt_tokens: int, url: str, answer: Answer) -> tuple[Rollout, ...]:
        with contextlib.suppress(IncompleteGroupError, WrongVersionError):
            return self._rollouts(answer.columns, sampling, num_prompt_tokens)
        payload = answer.payload  # as the server wrote it, for the message and the counts
        try:
            return self._rollouts(payload, sampling, num_prompt_tokens)
        except IncompleteGroupError as error:
            self.count_dropped(payload)
            raise AttemptError(without_key(f"{error}; {answer.shown}", self._api_key)) from error
        except WrongVersionError as error:
            self.count_dropped(payload)
            self.wrong_versions += sampling.n
            message = without_key(str(error), self._api_key)
            warn_often(_log, "dropped %s of %s: %s", counted(sampling.n, "rollout"), url, message)
            kind = LostServerError if self._router is None else AttemptError  # a router has other servers to ask
            raise kind(f"{url}: {message}") from error

    def _rollouts(self, payload: Any, sampling: Sampling, num_prompt_tokens: int) -> tuple[Rollout, ...]:
        return parse_group(
            payload,
            sampling,
            self.decode,
            versions=self._upstream.versions,
            vocab_size=self._vocab_size,
            num_prompt_tokens=num_prompt_tokens,
        )


def _body(prompt_tokens: Tokens, sampling: Sampling) -> bytes:
    return json.dumps(request_body(prompt_tokens, sampling)).encode()
