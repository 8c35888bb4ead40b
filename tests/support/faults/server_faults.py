"""Orders to stand-in servers, and the witness of a server that is gone."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tests.support.faults.matrix import SERVER_FAULT_S
from tests.support.faults.witness import write_witness


def ask(url: str, key: str, body: bytes | None = None) -> Any:
    """Return the answer of a stand-in server, which may still be gone by an earlier fault."""
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {key}"})
    for _ in range(100):
        with contextlib.suppress(urllib.error.URLError):
            return urllib.request.urlopen(request, timeout=30)
        time.sleep(0.1 * SERVER_FAULT_S)
    raise TimeoutError(f"no answer of {url}")


def await_refusal(url: str, facts: Mapping[str, Any]) -> None:
    """Wait until a server is gone. From then on, the first connection of this process to it that is refused is the
    witness. No server can report it, so it is seen where Python is about to connect.
    """
    place = urlsplit(url)
    address, is_met = (place.hostname, place.port), False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_met
        if event == "socket.connect" and not is_met and arguments[1] == address:
            is_met = True  # before the connection that this look makes
            is_met = _is_refused(address)
            if is_met:
                write_witness(facts)

    while not _is_refused(address):
        time.sleep(0.01)
    sys.addaudithook(look)


def _is_refused(address: tuple[Any, Any]) -> bool:
    with socket.socket() as end:
        return end.connect_ex(address) == errno.ECONNREFUSED
