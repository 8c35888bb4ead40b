"""Somebody without a key, who tries every port: ``python -m tests.support.strangers HOST PORT…``.

It prints a JSON object: port → the first bytes of an answer as text, or null.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil

WAIT_S = 1.0
"""Seconds for an answer. Servers of this host answer within milliseconds."""
_KNOCKS = (
    b"GET /model_info HTTP/1.1\r\nHost: here\r\nUser-Agent: " + b"stranger" * 10 + b"\r\nConnection: close\r\n\r\n",
    # A store's client: VALIDATE with its magic number, then PING with a number that comes back
    # (torch/csrc/distributed/c10d/TCPStoreBackend.hpp, TCPStore.cpp).
    struct.pack("=BIBI", 0, 0x3C85F7CE, 13, 77) + bytes(100),
    b"x" * 4096,
)
"""First bytes of a connection; at least as many as a key's proof has, so that nobody waits for more."""


def answer_of(host: str, port: int) -> str | None:
    """Return the beginning of the first answer of a port; None if it refuses connections, or stays silent."""
    for knock in _KNOCKS:
        try:
            with socket.create_connection((host, port), timeout=WAIT_S) as connection:
                connection.sendall(knock)
                if answer := connection.recv(200):
                    return answer.decode("latin-1")
        except OSError:
            continue
    return None


def free_port(host: str) -> int:
    """Return a port of this address at which nothing listens."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def listening(*processes: psutil.Process) -> set[tuple[str, int]]:
    """Return the addresses and ports at which processes listen, without arguments those of this process."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes or (psutil.Process(),)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


if __name__ == "__main__":
    target, ports = sys.argv[1], list(map(int, sys.argv[2:]))
    with ThreadPoolExecutor(16) as pool:
        print(json.dumps(dict(zip(ports, pool.map(lambda port: answer_of(target, port), ports), strict=True))))
