"""A handwritten server that speaks the part of SGLang's ``/generate`` that the client needs, over real sockets."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

Reply = str | Callable[[dict[str, Any]], web.StreamResponse]
Plan = Callable[[int, dict[str, Any]], Reply]
"""(index of the request on this server, its body) → a name that ``_reply`` knows, or a function from body to answer."""


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.005)


def sample(body: dict[str, Any], index: int, **meta: Any) -> dict[str, Any]:
    """Make one response: tokens (last prompt token, index, 2) with log-probs −1, −2, −3."""
    tokens = [body["input_ids"][-1], index, 2]
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 2},
            "weight_version": "default",
            "output_token_logprobs": [[-1.0 - i, token, None] for i, token in enumerate(tokens)],
            **meta,
        },
    }


_ABOUT: dict[str, dict[str, Any]] = {
    "/health": {},
    "/model_info": {"is_generation": True},
    "/server_info": {"tp_size": 1},
}
"""Answers to the questions that a router asks before it accepts a server."""


class FakeSGLang:
    """A server at ``fake.url`` that treats each request as ``plan`` says: ``with FakeSGLang(plan) as fake``.

    All tokens have the policy version ``version``. The server tells the names of ``models``, if there are any. ``hang``
    answers when ``fake.release`` is called. ``fake.requests`` are the bodies in the order of arrival, ``fake.arrivals``
    their times, ``fake.cancelled`` counts requests whose connection the client closed.
    """

    def __init__(
        self, plan: Plan = lambda index, body: "ok", *, version: str = "default", models: Sequence[str] = ()
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.authorization: list[str | None] = []
        self.open = self.max_open = self.cancelled = 0
        self._plan, self.version = plan, version
        self._models = [{"id": name} for name in models]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._released = asyncio.Event()
        self._hidden: set[str] = set()
        self.url = ""

    def __enter__(self) -> FakeSGLang:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._released.set)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            app.router.add_post(path, self._generate)
        models = {"/v1/models": {"data": self._models}} if self._models else {}
        for path, answer in (_ABOUT | models).items():
            app.router.add_get(path, functools.partial(self._tell, answer))
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop_listening(self) -> None:
        """Stop like a process that dies: no connection stays open without an answer.

        asyncio accepts a connection in one turn of its loop and serves it in the next. One that is between the two when
        the server stops is forgotten, neither served nor closed.
        """
        server = self._site._server
        assert isinstance(server, asyncio.Server)
        for listening in server.sockets:
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(0.01)
        await self._site.stop()

    def hide(self, path: str) -> None:
        """Answer this path as unknown from now on."""
        self._hidden.add(path)

    async def _tell(self, answer: dict[str, Any], request: web.Request) -> web.Response:
        if request.path in self._hidden:
            raise web.HTTPNotFound
        return web.json_response(answer)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        index = len(self.requests)
        self.requests.append(body)
        self.arrivals.append(time.monotonic())
        self.authorization.append(request.headers.get("Authorization"))
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        try:
            return await self._reply(self._plan(index, body), request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _reply(self, how: Reply, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if callable(how):
            return how(body)
        if how == "500":
            return web.Response(status=500, text="out of luck")
        if how == "400":
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)
        if how == "die":
            await self._stop_listening()
        if how in ("reset", "die"):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if how == "hang":
            await self._released.wait()
        if isinstance(body["sampling_params"], list):  # a batch: each rollout with its own seed
            alone = zip(body["input_ids"], body["sampling_params"], strict=True)
            each = [{**body, "input_ids": ids, "sampling_params": one} for ids, one in alone]
            return web.json_response([sample(one, i, weight_version=self.version) for i, one in enumerate(each)])
        n = body["sampling_params"]["n"]
        # Requests with a seed are for one response each: the first of a prompt, the second, …
        is_seeded = "sampling_seed" in body["sampling_params"]
        first = sum(one["input_ids"] == body["input_ids"] for one in self.requests) - 1 if is_seeded else 0
        samples = [sample(body, index, weight_version=self.version) for index in range(first, first + n)]
        if how == "partial":
            samples.pop()
        if how == "aborted":
            samples[-1] = sample(body, n - 1, finish_reason={"type": "abort", "message": "paused"})
        if how == "length":
            samples[0] = sample(body, 0, finish_reason={"type": "length", "length": 3})
        return web.json_response(samples if n > 1 else samples[0])
