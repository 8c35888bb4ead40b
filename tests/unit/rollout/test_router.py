"""Calls to a router, over real HTTP to a stand-in that answers as sglang-router 0.3 does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_dypo.rollout.router import Router


class FakeRouter:
    """A router with ``servers`` (URL → id). It queues orders, and carries them out when asked for its servers again."""

    def __init__(self, *servers: str) -> None:
        self.servers = {url: f"id-{url}" for url in servers}
        self.told: list[tuple[str, str, str]] = []
        """(method, path or URL of a server, key) of each call."""
        self.keys: set[str | None] = set()
        self.is_mute = False
        """Whether it leaves requests to add a server unanswered."""
        self.queue: list[tuple[str, str]] = []
        self._listings = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                workers = [{"url": url, "id": id_} for url, id_ in fake.list_servers().items()]
                self._reply(200, {"workers": workers})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.told.append(("POST", body["url"], body["api_key"]))
                if not fake.is_mute:
                    fake.queue.append(("add", body["url"]))
                    self._reply(202, {})

            def do_DELETE(self) -> None:
                fake.told.append(("DELETE", self.path, ""))
                fake.queue.append(("remove", self.path.removeprefix("/workers/id-")))
                self._reply(202, {})

            def _reply(self, status: int, payload: object) -> None:
                fake.keys.add(self.headers["Authorization"])
                body = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Print nothing: ``told`` has the record."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def list_servers(self) -> dict[str, str]:
        self._listings += 1
        if self._listings % 2:
            for action, url in self.queue:
                self.servers.pop(url, None) if action == "remove" else self.servers.update({url: f"id-{url}"})
            self.queue.clear()
        return self.servers

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[FakeRouter]:
    router = FakeRouter("http://a:1", "http://b:2")
    yield router
    router.stop()


def test_a_router_has_the_servers_of_the_last_push_and_no_others_once_it_is_told(fake: FakeRouter) -> None:
    Router(fake.url, "key").use_servers(["http://b:2", "http://d:4"])
    assert set(fake.servers) == {"http://b:2", "http://d:4"}
    assert fake.told == [("DELETE", "/workers/id-http://a:1", ""), ("POST", "http://d:4", "key")]
    assert fake.keys == {"Bearer key"}


def test_a_router_that_has_the_right_servers_is_told_nothing(fake: FakeRouter) -> None:
    Router(fake.url, "key").use_servers(["http://b:2", "http://a:1"])
    assert not fake.told


def test_a_router_may_be_left_without_servers(fake: FakeRouter) -> None:
    Router(fake.url, "key").use_servers([])
    assert not fake.servers


def test_a_router_that_does_not_do_as_told_is_in_the_log(caplog: pytest.LogCaptureFixture, fake: FakeRouter) -> None:
    fake.list_servers = lambda: {}  # type: ignore[method-assign]
    Router(fake.url, "key", deadline_s=0.2).use_servers(["http://a:1"])
    assert f"router {fake.url} has [] after 0.2 s, not ['http://a:1']" in caplog.text
    assert len(fake.told) == 1


def test_a_router_that_is_gone_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    wanted = [f"http://{name}:1" for name in "hgfedcba"]
    Router("http://127.0.0.1:9", None, deadline_s=0.1).use_servers(wanted)
    assert f"router http://127.0.0.1:9 does not answer after 0.1 s, not {sorted(wanted)}" in caplog.text


def test_a_request_that_a_router_does_not_answer_is_in_the_log(
    caplog: pytest.LogCaptureFixture, fake: FakeRouter
) -> None:
    fake.is_mute = True
    Router(fake.url, "key", deadline_s=0.2).use_servers(["http://a:1", "http://b:2", "http://d:4"])
    assert f"router {fake.url}: add http://d:4: no answer" in caplog.text
