"""Launcher of a stock SGLang server of which no route but health answers without the key.

Run by path under an interpreter that has SGLang: ``python sglang_keyed.py --model-path M …`` (arguments of
``sglang.launch_server``). That interpreter need not have this package, so nothing of it is imported here.

Works around, in SGLang 0.5.23, ``sglang/srt/utils/auth.py``: the key check lets WebSockets pass, such as
``/v1/realtime`` where a package for WebSockets is installed, ``/metrics`` and the method OPTIONS.
"""

import runpy
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

_Message = dict[str, Any]
_POLICY_VIOLATION = 1008


class NoWebSockets:
    """An ASGI application in front of another one. It refuses each WebSocket with status 403."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await self._app(scope, receive, send)


def require_key_everywhere() -> None:
    """Let SGLang's servers, which this process starts later, ask for the key on all routes but health."""
    from sglang.srt.utils import auth

    add_check, decide = auth.add_api_key_middleware, auth.decide_request_auth

    def add_checks(app: Any, **keys: Any) -> None:
        add_check(app, **keys)
        app.add_middleware(NoWebSockets)

    def decide_strictly(*, method: str, path: str, **others: Any) -> Any:
        is_metrics = path.startswith("/metrics")
        return decide(method="GET" if method == "OPTIONS" else method, path="/" if is_metrics else path, **others)

    auth.add_api_key_middleware, auth.decide_request_auth = add_checks, decide_strictly


def main() -> None:
    """Serve as ``python -m sglang.launch_server`` does."""
    sys.path[0] = str(Path.cwd())  # not this script's folder, whose files must not hide other modules
    require_key_everywhere()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
