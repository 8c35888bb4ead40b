"""Fake servers that answer SGLang's control routes over real HTTP and record the requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from megatron_dypo.supported import WEIGHT_SESSIONS, is_at_least

S = TypeVar("S", bound="FakeServer")

KEY = "secret"


@dataclass
class FakeServer:
    """One server: its state, its record of requests, and answers that a test sets in place of the usual ones."""

    model_path: str = "elsewhere"
    model_type: str = "qwen3"
    tp_size: int = 1
    ep_size: int = 1
    loaders: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """More of the answer to ``/server_info``."""
    version: str = "default"
    sglang: str = "0.5.23"
    url: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Path → status and JSON (or text) to answer with."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Path → URL to redirect to."""
    on_call: Callable[[str], object] = lambda path: None
    _http: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listen at a free port; after :meth:`die`, listen at the same port again."""
        port = int(self.url.rpartition(":")[2] or 0)
        self._http = _Server(("127.0.0.1", port), _handler(self))
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def die(self) -> None:
        """Refuse all further connections. A second call does nothing."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def come_back(self) -> None:
        """Answer again as a new process would: with the weights of the model folder."""
        self.version, self.on_call = "default", lambda path: None
        self.calls.clear()
        self.start()

    @property
    def posts(self) -> list[str]:
        """Return the paths of all POSTs, in order."""
        return [path for path, _ in self.calls if path not in ("/model_info", "/server_info")]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.calls.append((path, body))
        self.on_call(path)
        if path in self.answers:
            return self.answers[path]
        if path == "/model_info":
            info = {"model_path": self.model_path, "model_type": self.model_type, "weight_version": self.version}
            return 200, info
        if path == "/server_info":
            sizes = {"tp_size": self.tp_size, "ep_size": self.ep_size, "pp_size": 1, "dp_size": 1}
            found = {**sizes, "custom_weight_loader": list(self.loaders), "version": self.sglang}
            return 200, {**found, **self.settings}
        if path.endswith("_weight_update") and not is_at_least(self.sglang, WEIGHT_SESSIONS):
            return 404, {"detail": "Not Found"}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"success": True, "message": "Success"}


@contextmanager
def running(servers: list[S]) -> Iterator[list[S]]:
    """Start the servers, which require ``KEY``; stop them at the end."""
    for server in servers:
        server.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.die()


def fake_servers(count: int, **state: Any) -> AbstractContextManager[list[FakeServer]]:
    """Start ``count`` servers; see :func:`running`."""
    return running([FakeServer(**state) for _ in range(count)])


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: in some tests a client gives up on purpose, and the client's side reports it."""


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: dict[str, Any]) -> None:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                status, answer = 401, {"error": "Unauthorized"}
            else:
                status, answer = server.answer(self.path, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(307 if self.path in server.redirects else status)
            if self.path in server.redirects:
                self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: ``server.calls`` has the record."""

    return Handler
