"""A proxy in front of a real server. It passes everything on, and remembers the prompts that it was asked for."""

from __future__ import annotations

import asyncio
import json
import threading

import aiohttp
from aiohttp import web

_DEADLINE_S = 900.0


class CountingProxy:
    """Passes requests on to ``server``: ``with CountingProxy(url) as proxy``. ``proxy.url`` is its own address."""

    def __init__(self, server: str) -> None:
        self.asked: list[tuple[int, ...]] = []
        """Prompts of requests for rollouts, in the order of arrival."""
        self.url = ""
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> CountingProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_DEADLINE_S), auto_decompress=False, trust_env=False
        )
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.path == "/generate":
            self.asked.append(tuple(json.loads(body)["input_ids"]))
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        url = f"{self._server}{request.rel_url}"
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            content = await answer.read()
            kept = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
            return web.Response(status=answer.status, body=content, headers=kept)
