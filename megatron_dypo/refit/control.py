"""Control calls to SGLang: the same call to every server at once, each with a deadline and a checked answer.

Used from ordinary (not async) code: a daemon thread runs the event loop, so that a collective and the calls that
announce it can be under way together. Every error names the server, the call and the answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import aiohttp

from megatron_dypo.refit.deadline import Deadline

T = TypeVar("T")
Answer = dict[str, Any]

PauseMode = Literal["retract", "abort"]

# When one server of a collective call fails, the others fail as a consequence; this long we listen for who was first.
_GRACE_S = 2.0


class ServerError(RuntimeError):
    """A server refused a call, answered nonsense, or did not answer."""

    def __init__(self, message: str, *urls: str, is_silent: bool = False) -> None:
        """``urls``: the servers to blame; none where a call of all of them failed and nobody can be told from the rest."""
        super().__init__(message)
        self.urls = urls
        self.is_silent = is_silent
        """There was no answer at all, not even a refusal."""

    @property
    def url(self) -> str | None:
        """The server to blame, the first of several; None: nobody in particular."""
        return self.urls[0] if self.urls else None


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server says of itself."""

    url: str
    model_path: str
    model_type: str
    weight_version: str
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: int
    custom_loaders: tuple[str, ...]
    """``--custom-weight-loader``: names under which it takes updates by functions that it imports."""


class SGLangControl:
    """The control routes of some servers; one instance may be used from one thread at a time."""

    def __init__(self, urls: Sequence[str], api_key: str | None) -> None:
        if not urls:
            raise ValueError("urls=(): a refit needs at least one SGLang server")
        self.urls = tuple(url.rstrip("/") for url in urls)
        """The servers that get the calls; set between two attempts at a refit, never within one."""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Calls under way are dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # One method for each route.

    def describe(self, deadline: Deadline, urls: Sequence[str] | None = None) -> list[ServerInfo]:
        """Model, version and parallel sizes of each server, in the order of ``urls`` (None: the control's own)."""
        urls = self.urls if urls is None else urls
        models = self._start("GET", "/model_info", None, deadline, fail_fast=False, urls=urls).result()
        servers = self._start("GET", "/server_info", None, deadline, fail_fast=False, urls=urls).result()
        return [
            ServerInfo(
                url=url,
                model_path=str(model.get("model_path")),
                model_type=str(model.get("model_type")),
                weight_version=str(model.get("weight_version")),
                tensor_parallel=int(server.get("tp_size", 1)),
                pipeline_parallel=int(server.get("pp_size", 1)),
                data_parallel=int(server.get("dp_size", 1)),
                expert_parallel=int(server.get("ep_size", 1)),
                custom_loaders=tuple(server.get("custom_weight_loader") or ()),
            )
            for url, model, server in zip(urls, models, servers, strict=True)
        ]

    def weight_versions(self, deadline: Deadline) -> list[str]:
        """The version that each server says it serves."""
        return [str(model.get("weight_version")) for model in self._all("GET", "/model_info", None, deadline)]

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        """Stop generating. ``retract``: running requests go back to the queue, without their KV cache. ``abort``: they end."""
        self._all("POST", "/pause_generation", {"mode": mode}, deadline)

    def resume(self, deadline: Deadline) -> None:
        """Generate again."""
        self._all("POST", "/continue_generation", {}, deadline)

    def resume_memory(self, url: str, deadline: Deadline) -> None:
        """Give one server the memory back that it let go, for weights that are still to come."""
        self._start("POST", "/resume_memory_occupation", {}, deadline, fail_fast=False, urls=(url,)).result()

    def begin_update(self, deadline: Deadline) -> None:
        """Open a weight-update session; one that a dead trainer left open is closed first."""
        try:
            self._all("POST", "/begin_weight_update", {}, deadline)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            self.attempt([("/end_weight_update", {})], deadline.remaining())
            self._all("POST", "/begin_weight_update", {}, deadline)

    def end_update(self, deadline: Deadline) -> None:
        """Close the weight-update session."""
        self._all("POST", "/end_weight_update", {}, deadline)

    def set_version(self, version: str, deadline: Deadline) -> None:
        """Name the weights served; running requests record which of their tokens came before."""
        self._all("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False}, deadline)

    def start_init_group(self, bodies: Sequence[Answer], deadline: Deadline) -> Future[list[Answer]]:
        """Ask every server to join an update group; it answers when the group is whole."""
        return self._start("POST", "/init_weights_update_group", bodies, deadline, fail_fast=True)

    def start_update(self, body: Answer, deadline: Deadline) -> Future[list[Answer]]:
        """Announce a broadcast to every server; each answers when it has received and loaded the tensors."""
        return self._start("POST", "/update_weights_from_distributed", body, deadline, fail_fast=True)

    def start_load(self, bodies: Sequence[Answer], deadline: Deadline) -> list[Future[Answer]]:
        """Ask each server to run a custom loader; its answer comes when that has ended, and fails by itself."""

        timeout_s = deadline.remaining()

        async def one_server(url: str, body: Answer) -> Answer:
            async with self._session() as session:
                path = "/update_weights_from_tensor"
                return await self._call(session, "POST", url, path, body, timeout_s)

        return [self._submit(one_server(url, body)) for url, body in zip(self.urls, bodies, strict=True)]

    def update_from_disk(self, path: str, deadline: Deadline) -> None:
        """Load an HF folder that every server can read, and forget cached prefixes."""
        self._all("POST", "/update_weights_from_disk", {"model_path": path, "flush_cache": True}, deadline)

    def attempt(
        self, steps: Sequence[tuple[str, Answer | None]], timeout_s: float, urls: Sequence[str] | None = None
    ) -> list[ServerError]:
        """Call ``(path, body)`` after ``(path, body)`` on each server, whatever is refused; returns what went wrong.

        A body of None makes a GET, any other a POST. ``urls``: None: the control's own. A server that spends all of
        ``timeout_s`` is asked no more.
        """

        async def one_server(session: aiohttp.ClientSession, url: str) -> list[ServerError]:
            errors, deadline = [], Deadline(timeout_s)
            for path, body in steps:
                method = "GET" if body is None else "POST"
                try:
                    await self._call(session, method, url, path, body, deadline.remaining())
                except ServerError as error:
                    errors.append(error)
                except TimeoutError:
                    break
            return errors

        async def every_server() -> list[ServerError]:
            async with self._session() as session:
                asked = self.urls if urls is None else urls
                outcomes = await asyncio.gather(*(one_server(session, url) for url in asked))
            return [error for errors in outcomes for error in errors]

        return self._submit(every_server()).result()

    # The calls themselves.

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

    def _session(self) -> aiohttp.ClientSession:
        # A connection for each call: a kept one may be closed by the server just as a POST goes out.
        return aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(force_close=True, limit=0))

    async def _fan_out(
        self, method: str, path: str, calls: Sequence[tuple[str, Answer | None]], timeout_s: float, fail_fast: bool
    ) -> list[Answer]:
        async with self._session() as session:
            tasks = [asyncio.create_task(self._call(session, method, url, path, b, timeout_s)) for url, b in calls]
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
            raise _joined(errors, is_collective=fail_fast)
        return [task.result() for task in tasks]

    async def _call(
        self, session: aiohttp.ClientSession, method: str, url: str, path: str, body: Answer | None, timeout_s: float
    ) -> Answer:
        where = f"{method} {url}{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with session.request(method, url + path, json=body, timeout=timeout) as response:
                status, text = response.status, await response.text()
        except asyncio.TimeoutError as error:
            raise _UnansweredError(f"{where}: no answer in {timeout_s:.1f} s", url, is_silent=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{where}: no answer: {type(error).__name__}: {error}", url, is_silent=True) from error
        return _checked(where, url, status, text)


class _UnansweredError(ServerError):
    """The call was sent, and its time ran out."""


def _joined(errors: Sequence[ServerError], *, is_collective: bool) -> ServerError:
    """One error for those of several servers.

    In a collective call the others fail, or wait, because of one: a server that is gone is then blamed alone, and one
    that only waits is not blamed.
    """
    blamed = [error for error in errors if not (is_collective and isinstance(error, _UnansweredError))]
    gone = [error for error in blamed if error.is_silent]
    blamed = gone if is_collective and gone else blamed
    urls = [url for error in blamed for url in error.urls]
    return ServerError("; ".join(map(str, errors)), *urls, is_silent=all(error.is_silent for error in errors))


def _checked(where: str, url: str, status: int, text: str) -> Answer:
    """The JSON object of an answer ({} for plain text). A refusal may come with status 200 and ``success: false``."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        answer = {}
    answer = answer if isinstance(answer, dict) else {}
    if status != 200 or answer.get("success", True) is not True:
        raise ServerError(f"{where}: status {status}: {answer.get('message') or text[:500]}", url)
    return answer
