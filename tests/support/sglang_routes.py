"""Ask every route of SGLang's own application without its key: ``python -m tests.support.sglang_routes [as-is]``.

It needs no model and no package for WebSockets, since it calls the application itself. With ``as-is`` SGLang has no
patch of a launcher. It prints a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_dypo.rollout.server import sglang_cpu

KEY = "the-key"
Header = tuple[bytes, bytes]


def authorization(key: str) -> list[Header]:
    return [(b"authorization", f"Bearer {key}".encode())]


async def ask(app: Any, kind: str, method: str, path: str, headers: Sequence[Header]) -> Any:
    """Return the status of an answer, or the first message to a WebSocket."""
    sent: list[dict[str, Any]] = []
    first = {"type": "http.request", "body": b""} if kind == "http" else {"type": "websocket.connect"}

    async def receive() -> dict[str, Any]:
        return first

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
    }
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": list(headers)}
    scope |= {"subprotocols": [], "server": ("127.0.0.1", 1), "client": ("192.0.2.1", 9)}
    try:
        await asyncio.wait_for(app(scope, receive, send), 20)
    except Exception as error:  # noqa: BLE001 (there is no model behind the application)
        sent.append({"type": repr(error)})
    return sent[0].get("status", sent[0]["type"])


def routes_of(routes: Sequence[Any]) -> Iterator[tuple[str, set[str]]]:
    """Yield each path with its methods; a WebSocket has none."""
    for route in routes:
        if hasattr(route, "path"):
            is_socket = "websocket" in type(route).__name__.lower()
            yield route.path, set() if is_socket else {"OPTIONS", "POST", *(getattr(route, "methods", None) or ["GET"])}
        else:
            inner = getattr(route, "router", None) or getattr(route, "original_router", None)
            yield from routes_of(getattr(inner, "routes", []))


async def metrics(scope: Any, receive: Any, send: Any) -> None:
    """Answer as the application that SGLang mounts for ``--enable-metrics``."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"metrics"})


async def main() -> None:
    import sglang.srt.entrypoints.http_server as server

    if "as-is" not in sys.argv:
        sglang_cpu._require_key_everywhere()
    from sglang.srt.utils.auth import add_api_key_middleware

    app = server.app
    app.mount("/metrics/", metrics)
    add_api_key_middleware(app, api_key=KEY, admin_api_key=None)
    found = []
    for path, methods in routes_of(app.routes):
        plain = path.replace("{", "").replace("}", "")
        for headers in ([], authorization("wrong")):
            for method in sorted(methods):
                found.append((method, path, await ask(app, "http", method, plain, headers)))
            if not methods:
                found.append(("WEBSOCKET", path, await ask(app, "websocket", "GET", plain, headers)))
    with_key = await ask(app, "http", "GET", "/metrics/", authorization(KEY))
    without = await ask(app, "http", "GET", "/metrics/", [])
    print(json.dumps({"found": found, "metrics": {"with the key": with_key, "without": without}}))


if __name__ == "__main__":
    asyncio.run(main())
