"""What a router is told, over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_dypo.rollout.router import Router


@pytest.fixture
def told() -> Iterator[tuple[str, list[str]]]:
    """A router's URL and the requests that it got; it refuses to remove ``http://c:3``."""
    lines: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            lines.append(f"{self.headers['Authorization']} {self.path}")
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404 if self.path.endswith("c%3A3") else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Kept in ``lines``."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", lines
    server.shutdown()
    server.server_close()


def test_a_router_hears_of_the_servers_that_went_and_came(told: tuple[str, list[str]]) -> None:
    url, lines = told
    Router(url, "key").move(["http://a:1", "http://b:2"], ["http://b:2", "http://d:4"])
    assert lines == [
        "Bearer key /remove_worker?url=http%3A%2F%2Fa%3A1",
        "Bearer key /add_worker?url=http%3A%2F%2Fd%3A4",
    ]


def test_a_refusal_of_a_router_is_in_the_log(told: tuple[str, list[str]], caplog: pytest.LogCaptureFixture) -> None:
    url, _ = told
    Router(url, None).move(["http://c:3"], [])
    assert f"router {url}: remove_worker http://c:3: 404" in caplog.text


def test_a_router_that_is_gone_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    Router("http://127.0.0.1:9", None).move([], ["http://a:1"])
    assert "add_worker http://a:1: no answer" in caplog.text
