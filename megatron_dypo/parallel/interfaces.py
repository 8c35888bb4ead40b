"""The network interface of process groups: gloo and NCCL listen on it, and ask nobody for a key. Needs no torch."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import MutableMapping

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
