"""The network interface of process groups: gloo and NCCL listen on it, and ask nobody for a key. Needs no torch."""

from __future__ import annotations

import ipaddress
import logging
import platform
import socket
from collections.abc import Iterator, MutableMapping

_log = logging.getLogger(__name__)
_ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737), to ask for the interface of the default route."""
_ANY_PORT = 9
"""A route does not depend on the port."""
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name it. Both libraries read them when a process makes its first groups."""


def stay_on_this_host(environment: MutableMapping[str, str]) -> None:
    """Let process groups listen on loopback addresses only, unless the environment names an interface already."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        for variable in VARIABLES:
            environment.setdefault(variable, loopback)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address, or ``localhost``. Other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening_address(name: str) -> tuple[socket.AddressFamily, str]:
    """Return family and address at which a listener of this host is reached by ``name`` from other hosts.

    Many hosts know their own name by a loopback address only, at which other hosts do not reach them. Then the address
    is that of all interfaces, ``0.0.0.0``.

    Raises:
        socket.gaierror: this host knows no address for the name.
    """
    family, _, _, _, address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    if is_loopback(str(address[0])) and not is_loopback(name):
        return socket.AF_INET, "0.0.0.0"
    return family, str(address[0])


def address_towards(host: str) -> str:
    """Return the address of this machine on its way to another: a loopback address if that is this machine by such.

    Nothing is sent.

    Raises:
        OSError: no address is known for ``host``, or no route leads there.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # connecting a datagram socket only finds the route
        return str(probe.getsockname()[0])


def join_network(environment: MutableMapping[str, str]) -> None:
    """Name the network interface of gloo, where this host knows its own name by loopback addresses only.

    gloo listens at the address of that name, so that ranks of other hosts would not reach it. The environment's own
    choice stays. Of several interfaces, that of the default route is named; without one a warning is logged.
    """
    variable = "GLOO_SOCKET_IFNAME"
    if variable in environment or not _knows_itself_by_loopback():
        return
    interfaces = dict(_interfaces())
    names = sorted(set(interfaces.values()))
    chosen = names[0] if len(names) == 1 else interfaces.get(_default_route(), "")
    if chosen:
        environment[variable] = chosen
    elif names:
        _log.warning(
            "%s knows its own name by a loopback address only, and has several interfaces: export %s, one of %s",
            *(platform.node(), variable, ", ".join(names)),
        )


def _knows_itself_by_loopback() -> bool:
    try:
        found = socket.getaddrinfo(platform.node(), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(is_loopback(str(address[0])) for *_, address in found)


def _interfaces() -> Iterator[tuple[str, str]]:
    """Yield each address at which other hosts may reach this one, with its interface."""
    import psutil

    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family in (socket.AF_INET, socket.AF_INET6) and name in states and states[name].isup:
                address = ipaddress.ip_address(found.address.partition("%")[0])
                if not address.is_loopback and not address.is_link_local:
                    yield str(address), name


def _default_route() -> str:
    """Return this host's address towards others; empty if there is none. Nothing is sent."""
    try:
        return address_towards(_ELSEWHERE)
    except OSError:
        return ""
