"""Control calls to SGLang: the same call to every server at once, each with a deadline and a checked answer.

The interface is synchronous. A daemon thread runs the event loop, so that a collective and the calls that announce it
can run at the same time. Every error names the server, the call and the answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import aiohttp

from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.refit.answers import (
    Answer,
    ServerError,
    ServerInfo,
    UnansweredError,
    checked,
    joined,
    read,
    server_info,
)
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.rollout.ask import BUSY

T = TypeVar("T")
_log = logging.getLogger(__name__)

PauseMode = Literal["retract", "abort"]

# If one server of a collective call fails, the others fail as a consequence. This is the wait for all to report.
_GRACE_S = 2.0
_FIRST_PAUSE_S, _MAX_PAUSE_S, _PAUSE_SHARE = 0.25, 5.0, 0.1
"""Pauses before a busy server is asked again: they double, up to the longest or to a share of the time left."""


class SGLangControl:
    """The control routes of some servers. Only one thread at a time may use an instance.

    It holds one HTTP session from its construction to :meth:`close`. Each call opens a new connection, since a server
    may close an idle one just as a POST goes out.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None) -> None:
        if not urls:
            raise ValueError("urls=(): a refit needs at least one SGLang server")
        self.urls = tuple(url.rstrip("/") for url in urls)
        """The servers that get the calls. It changes only between two attempts at a refit."""
        self._without_sessions: set[str] = set()
        """Servers that :meth:`describe` found to be too old for weight-update sessions."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-control", daemon=True)
        self._thread.start()
        self._session = self._submit(_open_session(api_key)).result()

    def close(self) -> None:
        """Drop the running calls, close the session and stop the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._submit(_cancel_others()).result()
        self._submit(self._session.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # One method for each route.

    def describe(self, deadline: Deadline, urls: Sequence[str] | None = None) -> list[ServerInfo]:
        """Ask each of ``urls`` (None: all servers) for its model, versions and parallel sizes, in order."""
        urls = self.urls if urls is None else urls
        models = self._start("GET", "/model_info", None, deadline, fail_fast=False, urls=urls).result()
        servers = self._start("GET", "/server_info", None, deadline, fail_fast=False, urls=urls).result()
        infos = [server_info(*answers) for answers in zip(urls, models, servers, strict=True)]
        self._without_sessions -= set(urls)
        self._without_sessions |= {info.url for info in infos if not info.has_sessions}
        return infos

    @property
    def with_sessions(self) -> tuple[str, ...]:
        """Return the servers that need a weight-update session; an older one takes updates at any time."""
        return tuple(url for url in self.urls if url not in self._without_sessions)

    def weight_versions(self, deadline: Deadline) -> list[str]:
        """Ask each server which version it serves."""
        return [str(model.get("weight_version")) for model in self._all("GET", "/model_info", None, deadline)]

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        """Stop generation. Running requests go back to the queue without KV cache (``retract``), or end (``abort``)."""
        self._all("POST", "/pause_generation", {"mode": mode}, deadline)

    def resume(self, deadline: Deadline) -> None:
        """Resume generation."""
        self._all("POST", "/continue_generation", {}, deadline)

    def resume_memory(self, url: str, deadline: Deadline) -> None:
        """Make one server allocate the memory again that it released, for weights that come next."""
        self._start("POST", "/resume_memory_occupation", {}, deadline, fail_fast=False, urls=(url,)).result()

    def begin_update(self, deadline: Deadline) -> None:
        """Open a weight-update session. A session that a dead trainer left open is closed first."""
        try:
            self._in_sessions("/begin_weight_update", deadline)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            self.attempt([("/end_weight_update", {})], deadline.remaining(), self.with_sessions)
            self._in_sessions("/begin_weight_update", deadline)

    def end_update(self, deadline: Deadline) -> None:
        """Close the weight-update session."""
        self._in_sessions("/end_weight_update", deadline)

    def set_version(self, version: str, deadline: Deadline) -> None:
        """Set the name of the served weights. Running requests record which of their tokens came before."""
        self._all("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False}, deadline)

    def start_init_group(self, bodies: Sequence[Answer], deadline: Deadline) -> Future[list[Answer]]:
        """Ask every server to join an update group. A server answers when the group is complete."""
        return self._start("POST", "/init_weights_update_group", bodies, deadline, fail_fast=True)

    def start_update(self, body: Answer, deadline: Deadline) -> Future[list[Answer]]:
        """Announce a broadcast to every server. A server answers when it has received and loaded the tensors."""
        return self._start("POST", "/update_weights_from_distributed", body, deadline, fail_fast=True)

    def start_load(self, bodies: Sequence[Answer], deadline: Deadline) -> list[Future[Answer]]:
        """Ask each server to run a custom loader. A server answers, or fails, when its loader has ended."""
        timeout_s, path = deadline.remaining(), "/update_weights_from_tensor"
        return [
            self._submit(self.call("POST", url, path, body, timeout_s))
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def update_from_disk(self, path: str, deadline: Deadline) -> None:
        """Make the servers load an HF folder that all can read, and drop cached prefixes."""
        self._all("POST", "/update_weights_from_disk", {"model_path": path, "flush_cache": True}, deadline)

    def attempt(
        self, steps: Sequence[tuple[str, Answer | None]], timeout_s: float, urls: Sequence[str] | None = None
    ) -> list[ServerError]:
        """Make the calls ``(path, body)`` on each server one after the other, also after refusals; return the errors.

        A body of None makes a GET, any other body a POST. ``urls`` of None means all servers. A server that uses up
        ``timeout_s`` gets no more calls.
        """

        async def one_server(url: str) -> list[ServerError]:
            errors, deadline = [], Deadline(timeout_s)
            for path, body in steps:
                method = "GET" if body is None else "POST"
                try:
                    await self.call(method, url, path, body, deadline.remaining())
                except ServerError as error:
                    errors.append(error)
                except TimeoutError:
                    break
            return errors

        async def every_server() -> list[ServerError]:
            asked = self.urls if urls is None else urls
            outcomes = await asyncio.gather(*(one_server(url) for url in asked))
            return [error for errors in outcomes for error in errors]

        return self._submit(every_server()).result()

    # The calls themselves.

    def _in_sessions(self, path: str, deadline: Deadline) -> None:
        if self.with_sessions:
            self._start("POST", path, {}, deadline, fail_fast=False, urls=self.with_sessions).result()

    def _all(self, method: str, path: str, body: Answer | None, deadline: Deadline) -> list[Answer]:
        return self._start(method, path, body, deadline, fail_fast=False).result()

    def _start(
        self,
        method: str,
        path: str,
        body: Answer | Sequence[Answer] | None,
        deadline: Deadline,
        *,
        fail_fast: bool,
        urls: Sequence[str] | None = None,
    ) -> Future[list[Answer]]:
        urls = self.urls if urls is None else urls
        bodies = [body] * len(urls) if body is None or isinstance(body, Mapping) else list(body)
        try:
            timeout_s = deadline.remaining()
        except TimeoutError as error:
            raise ServerError(f"{method} {path} was not sent to {', '.join(urls)}: {error}") from error
        return self._submit(self._fan_out(method, path, list(zip(urls, bodies, strict=True)), timeout_s, fail_fast))

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _fan_out(
        self, method: str, path: str, calls: Sequence[tuple[str, Answer | None]], timeout_s: float, fail_fast: bool
    ) -> list[Answer]:
        tasks = [asyncio.create_task(self.call(method, url, path, body, timeout_s)) for url, body in calls]
        try:
            when = asyncio.FIRST_EXCEPTION if fail_fast else asyncio.ALL_COMPLETED
            _, pending = await asyncio.wait(tasks, return_when=when)
            if pending:
                await asyncio.wait(pending, timeout=_GRACE_S)
        finally:
            for task in tasks:
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServerError)]
        if errors:
            raise joined(errors, is_collective=fail_fast)
        return [task.result() for task in tasks]

    async def call(self, method: str, url: str, path: str, body: Answer | None, timeout_s: float) -> Answer:
        """Make one call to one server. Runs in the control's event loop.

        A server that takes no request now (HTTP 429 or 503) is asked again until the time is over. Redirects are not
        followed, since they would send the key to another host.

        Raises:
            ServerError: no answer, a refusal, a redirect, or an answer of more than ``MAX_ANSWER_BYTES``.
        """
        where, deadline, pause_s = f"{method} {url}{path}", Deadline(timeout_s), _FIRST_PAUSE_S
        before = ""
        try:
            while True:
                limit = aiohttp.ClientTimeout(total=deadline.remaining())
                async with self._session.request(
                    method, url + path, json=body, timeout=limit, allow_redirects=False
                ) as response:
                    status, text = response.status, await read(response, where, url)
                if status not in BUSY or deadline.left() <= pause_s:
                    break
                warn_often(_log, "a server takes no request now; asking again: %s", f"{where}: HTTP {status}")
                before = f"status {status}: {text}, then "
                await asyncio.sleep(pause_s)
                pause_s = min(2.0 * pause_s, _MAX_PAUSE_S, max(_FIRST_PAUSE_S, _PAUSE_SHARE * deadline.left()))
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise UnansweredError(f"{where}: {before}no answer in {timeout_s:.1f} s", url, is_silent=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(
                f"{where}: {before}no answer: {type(error).__name__}: {error}", url, is_silent=True
            ) from error
        return checked(where, url, status, text)


async def _open_session(api_key: str | None) -> aiohttp.ClientSession:
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(force_close=True, limit=0))


async def _cancel_others() -> None:
    """Cancel all other tasks of the loop, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
