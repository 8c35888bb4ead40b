"""The names of servers, with a resolver that knows what a cluster's resolvers know."""

from __future__ import annotations

import logging
import platform
import socket
from typing import Any

import pytest

from megatron_dypo.rollout.server import names
from megatron_dypo.rollout.server.names import require_known_hosts

HOSTS = {"node3": ["10.0.0.3"], "self": ["127.0.1.1"], "six": ["fe80::1%eth0"], "both": ["127.0.0.1", "10.0.0.4"]}


@pytest.fixture(autouse=True)
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked up; ``busy`` is answered the second time."""
    asked: list[str] = []
    monkeypatch.setattr(names, "_PAUSE_S", 0.0)

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        if host == "busy" and asked.count(host) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        known = HOSTS | {"busy": ["10.0.0.5"], "localhost": ["127.0.0.1"], platform.node(): ["127.0.1.1"]}
        known |= {host: [host]} if host[0].isdigit() or ":" in host else {}
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("host", ["node3", "busy", "six", "both", "localhost", "127.0.0.1", "[::1]", platform.node()])
def test_a_name_with_an_address_passes_without_a_word(host: str, caplog: pytest.LogCaptureFixture) -> None:
    require_known_hosts([f"http://{host}:30000"])
    assert not caplog.records


def test_a_name_without_an_address_is_refused_at_once_with_the_host_that_asked(lookups: list[str]) -> None:
    with pytest.raises(ValueError, match="knows no address for node4") as raised:
        require_known_hosts(["http://node3:30000", "http://node4:30000"])
    assert str(raised.value).startswith(f"rollout.servers.urls: http://node4:30000: {platform.node()} knows")
    assert lookups == ["node3", "node4"]


def test_another_name_that_means_this_host_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        require_known_hosts(["http://self:30000"])
    assert "looks up self as 127.0.1.1, which is this host itself" in caplog.text
