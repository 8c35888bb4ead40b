"""The real router at an address of the network, and somebody without the key who tries all of it."""

from __future__ import annotations

import http.client
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.server.http_door import HEALTH, HttpDoor
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.support.rollout.clients import make_client, make_prompts
from tests.support.routers import running_router
from tests.support.strangers import answer_of, free_port, listening

KEY = "0123456789abcdef"
# sglang-router 0.3.2, src/server.rs
PUBLIC = ["/liveness", "/readiness", "/health", "/health_generate", "/engine_metrics"]
PUBLIC += ["/v1/models", "/get_model_info", "/get_server_info"]
PROTECTED = ["/generate", "/v1/chat/completions", "/v1/completions", "/rerank", "/v1/rerank", "/v1/responses"]
PROTECTED += ["/v1/responses/1", "/v1/responses/1/cancel", "/v1/responses/1/input_items", "/v1/embeddings"]
PROTECTED += ["/v1/classify", "/v1/conversations", "/v1/conversations/1", "/v1/conversations/1/items"]
PROTECTED += ["/v1/conversations/1/items/1", "/v1/tokenize", "/v1/detokenize", "/v1/tokenizers", "/v1/tokenizers/1"]
PROTECTED += ["/flush_cache", "/get_loads", "/parse/function_call", "/parse/reasoning", "/wasm", "/wasm/1"]
PROTECTED += ["/workers", "/workers/1", "/ha/status", "/ha/health", "/ha/workers", "/ha/policies", "/", "/metrics"]


def address_on_the_network() -> str | None:
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


HOST = address_on_the_network()
on_the_network = pytest.mark.skipif(HOST is None, reason="this host has loopback addresses alone")


@pytest.fixture
def router(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    assert HOST is not None
    with running_router(tmp_path, ["http://127.0.0.1:9"], KEY, host=HOST) as started:
        yield started


def ask(url: str, method: str, path: str, key: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    connection.request(method, path, b"{}", {"Authorization": f"Bearer {key}"} if key else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@on_the_network
def test_no_route_but_health_answers_without_the_key(router: tuple[str, subprocess.Popen]) -> None:
    url, _ = router
    with FakeSGLang() as server:
        Router(url, KEY).use_servers([server.url])
        assert ask(url, "GET", "/v1/models", KEY)[0] != 401, "with the key it answers"
        for path in (*PUBLIC, *PROTECTED):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                is_health = method == "GET" and path in HEALTH
                for key in (None, "wrong", KEY[:-1], KEY + "0"):
                    assert ask(url, method, path, key) == (200 if is_health else 401, b""), (method, path)


@on_the_network
def test_no_port_of_the_router_tells_a_stranger_anything(router: tuple[str, subprocess.Popen]) -> None:
    url, process = router
    assert HOST is not None
    port = int(url.rpartition(":")[2])
    family = psutil.Process(process.pid)
    found = listening(family, *family.children(recursive=True))
    assert (HOST, port) in found
    assert {address for address, _ in found} == {HOST, "127.0.0.1", "255.255.255.255"}
    for _, other in found - {(HOST, port)}:
        assert answer_of(HOST, other) is None
    for address, other in found:
        if address == "255.255.255.255":
            assert all(answer_of(host, other) is None for host in (address, "127.0.0.1") if (host, other) not in found)
            with pytest.raises(OSError, match=r"unreachable|denied|refused"):
                socket.create_connection((address, other), timeout=5)


@on_the_network
def test_rollouts_pass_with_the_key(router: tuple[str, subprocess.Popen]) -> None:
    url, _ = router
    with FakeSGLang() as server:
        Router(url, KEY).use_servers([server.url])
        client = make_client([server.url], router=url, api_key=KEY)
        assert len(collect(make_prompts(6), client, group_size=3, progress=False)[0]) == 6


@on_the_network
def test_a_router_that_dies_ends_the_command_with_a_failure(router: tuple[str, subprocess.Popen]) -> None:
    _, process = router
    (guard,) = psutil.Process(process.pid).children()
    (inner,) = guard.children()
    inner.kill()
    assert process.wait(30) == 128 + 9


@on_the_network
def test_a_router_that_is_told_to_stop_ends_well_with_all_of_its_processes(
    router: tuple[str, subprocess.Popen],
) -> None:
    _, process = router
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


@pytest.fixture
def behind() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


def test_bytes_pass_both_ways_as_they_come(behind: socket.socket) -> None:
    port = free_port("127.0.0.1")
    door = HttpDoor("127.0.0.1", port, KEY, behind.getsockname()[1])
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\nauthorization: bearer {KEY}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head[:20])
        client.sendall(head[20:] + b"begin")
        server, _ = behind.accept()
        with server:
            assert server.recv(len(head) + 5, socket.MSG_WAITALL) == head + b"begin"
            for number in range(3):
                server.sendall(b"data: %d\n\n" % number)
                assert client.recv(9, socket.MSG_WAITALL) == b"data: %d\n\n" % number
            client.close()
            server.settimeout(20)
            assert server.recv(1) == b"", "a client that goes away ends the request"
    door.close()


def test_a_server_that_is_not_up_yet_is_not_healthy() -> None:
    port = free_port("127.0.0.1")
    door = HttpDoor("127.0.0.1", port, KEY, free_port("127.0.0.1"))
    assert ask(f"http://127.0.0.1:{port}", "GET", "/health") == (503, b"")
    door.close()


@pytest.mark.parametrize("first", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\r\n\r\n"])
def test_what_is_no_request_with_a_key_is_refused(behind: socket.socket, first: bytes) -> None:
    port = free_port("127.0.0.1")
    door = HttpDoor("127.0.0.1", port, KEY, behind.getsockname()[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(first)
        assert client.recv(400).startswith(b"HTTP/1.1 401 ")
    door.close()


def test_a_head_without_an_end_is_dropped(behind: socket.socket) -> None:
    port = free_port("127.0.0.1")
    door = HttpDoor("127.0.0.1", port, KEY, behind.getsockname()[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        began = time.monotonic()

        def is_dropped() -> bool:
            try:
                client.sendall(b"x" * 4096)
            except OSError:
                return True
            return False

        wait_until(is_dropped, "the connection is closed")
        assert time.monotonic() - began < 9
    door.close()
