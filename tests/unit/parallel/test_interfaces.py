"""Addresses and interfaces on hosts that know their own name by a loopback address, as Debian sets it up."""

from __future__ import annotations

import logging
import platform
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_dypo.parallel import interfaces
from megatron_dypo.parallel.interfaces import join_network, listening_address

FOUR, SIX = socket.AF_INET, socket.AF_INET6
NAMES = {
    "node1": (FOUR, "10.0.0.1"),
    "self": (FOUR, "127.0.1.1"),
    "six": (SIX, "fd78::1"),
    "localhost": (FOUR, "127.0.0.1"),
}


@pytest.fixture(autouse=True)
def _lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        family, address = NAMES[host]
        return [(family, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a host a name and interfaces, and a default route if it has one."""

    def become(name: str, *, route: str = "", **addresses: tuple[socket.AddressFamily, str]) -> None:
        known = {"lo": (FOUR, "127.0.0.1"), "down0": (FOUR, "10.9.0.1"), "link": (SIX, "fe80::1%link"), **addresses}
        found = {n: [SimpleNamespace(family=family, address=address)] for n, (family, address) in known.items()}
        monkeypatch.setattr(platform, "node", lambda: name)
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
        monkeypatch.setattr(psutil, "net_if_stats", lambda: {n: SimpleNamespace(isup=n != "down0") for n in found})
        monkeypatch.setattr(interfaces, "_default_route", lambda: route)

    return become


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("node1", (FOUR, "10.0.0.1")),
        ("six", (SIX, "fd78::1")),
        ("localhost", (FOUR, "127.0.0.1")),
        ("self", (FOUR, "0.0.0.0")),
    ],
)
def test_a_listener_is_reached_by_its_name(name: str, expected: tuple[socket.AddressFamily, str]) -> None:
    assert listening_address(name) == expected


@pytest.mark.parametrize(
    ("route", "others", "chosen"),
    [
        ("", {"eth0": (FOUR, "10.0.0.1")}, "eth0"),
        ("10.0.0.1", {"eth0": (FOUR, "10.0.0.1"), "ib0": (FOUR, "10.1.0.1")}, "eth0"),
        ("", {"eth0": (FOUR, "10.0.0.1"), "ib0": (FOUR, "10.1.0.1")}, None),
        ("", {}, None),
    ],
    ids=["one", "several", "several without a default route", "none"],
)
def test_a_host_that_is_a_loopback_address_to_itself_uses_its_network(
    host: Any, caplog: pytest.LogCaptureFixture, route: str, others: dict[str, Any], chosen: str | None
) -> None:
    host("self", route=route, **others)
    environment: dict[str, str] = {}
    with caplog.at_level(logging.WARNING):
        join_network(environment)
    assert environment == ({"GLOO_SOCKET_IFNAME": chosen} if chosen else {})
    told = "export GLOO_SOCKET_IFNAME, one of eth0, ib0" in caplog.text
    assert told is (len(others) > 1 and chosen is None)


def test_a_host_with_an_address_and_a_users_choice_are_left_alone(host: Any) -> None:
    environment: dict[str, str] = {}
    for name in ("node1", "six", "unknown"):
        host(name, eth0=(FOUR, "10.0.0.1"))
        join_network(environment)
    assert environment == {}
    host("self", eth0=(FOUR, "10.0.0.1"))
    environment["GLOO_SOCKET_IFNAME"] = "ib0"
    join_network(environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "ib0"}


def test_the_address_of_the_default_route_is_one_of_this_hosts() -> None:
    address = interfaces._default_route()
    assert address == "" or address in dict(interfaces._interfaces())
