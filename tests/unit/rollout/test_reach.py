"""Which hosts of servers answer: real sockets, and the errors of networks that are not here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dypo.rollout.server import reach, servers
from megatron_dypo.rollout.server.reach import find_unreachable
from megatron_dypo.rollout.server.servers import NotHealthyError
from tests.support.rollout.fake_pools import start_pool


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_ATTEMPT_S", 0.3)
    monkeypatch.setattr(reach, "_PAUSE_S", 0.05)


@contextlib.contextmanager
def silent() -> Iterator[socket.socket]:
    """Listen at a port whose queue of connections is full: the kernel drops further ones, as a firewall would."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def free_url() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_hosts_that_accept_or_refuse_are_reached_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        found = find_unreachable([f"http://localhost:{listener.getsockname()[1]}", free_url()] * 100, 60.0)
    assert found == {}
    assert time.monotonic() < began + 20.0


def test_a_host_that_drops_connections_is_found_after_the_deadline_and_not_before() -> None:
    began = time.monotonic()
    with silent() as listener:
        assert find_unreachable([free_url(), url_of(listener)], 1.0) == {url_of(listener): "no answer"}
    assert time.monotonic() > began + 1.0


def test_a_host_that_answers_before_the_deadline_is_reached() -> None:
    with silent() as listener:
        timer = threading.Timer(1.0, lambda: [listener.accept() for _ in range(2)])
        timer.start()
        assert find_unreachable([url_of(listener)], 60.0) == {}
        timer.join()


@pytest.mark.parametrize(
    ("number", "is_reached"),
    [
        (errno.EHOSTUNREACH, False),
        (errno.ENETUNREACH, False),
        (errno.EACCES, False),
        (errno.ETIMEDOUT, False),
        (errno.EADDRNOTAVAIL, False),
        (errno.EAFNOSUPPORT, False),
        (errno.ECONNREFUSED, True),
        (errno.ECONNRESET, True),
    ],
)
def test_what_the_network_says_is_told_apart_from_what_the_host_says(
    monkeypatch: pytest.MonkeyPatch, number: int, is_reached: bool
) -> None:
    async def connect(*_: object) -> None:
        raise OSError(number, "said")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    found = find_unreachable([free_url()], 0.0)
    assert not found if is_reached else len(found) == 1


def test_a_name_that_is_lost_meanwhile_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "busy")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = find_unreachable(["http://no.such.name.invalid:30000"], 0.0)
    assert next(iter(found.values())).startswith("no address: ")


def test_servers_behind_a_firewall_are_named_long_before_they_could_have_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_REACH_S", 0.5)
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "key")
    with silent() as first, silent() as second:
        urls = (free_url(), url_of(first), url_of(second))
        with pytest.raises(NotHealthyError) as raised:
            start_pool("python", tmp_path, urls=urls, start_deadline_s=600.0)
    assert str(raised.value).startswith(f"rollout.servers.urls: {urls[1]} and 1 more: ")
    assert "could not connect for 0.5 s (no answer)" in str(raised.value)
