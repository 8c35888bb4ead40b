"""Whether connections to servers get through to their hosts, asked before anybody waits for the servers.

A host that lives refuses a connection to a port at which nothing listens yet. A connection that gets no answer at all,
or an answer of the network, was stopped by a firewall, or its host is down.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp

from megatron_dypo.processes.running_time import running_time

_ATTEMPT_S = 5.0
_PAUSE_S = 1.0
_AT_ONCE = 64
_ANSWERS = (ConnectionRefusedError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""Errors that come from the host itself. Others come from the network, from the name server or from this host."""


def is_answer_of_host(error: BaseException) -> bool:
    """Return whether an error of a connection or of a request shows that the server's host lives."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, aiohttp.ClientError) and not isinstance(error, OSError):
        return True  # what it sent is no answer of HTTP
    return isinstance(error, (*_ANSWERS, aiohttp.ServerDisconnectedError))


def find_unreachable(urls: Sequence[str], deadline_s: float) -> dict[str, str]:
    """Return URL → what connections to it met, for the URLs whose host gave no answer for ``deadline_s`` seconds.

    It returns at once if all hosts answer. It tries 64 URLs at a time. Blocks: call it outside of event loops.
    """
    return asyncio.run(_find_all(urls, running_time() + deadline_s))


async def _find_all(urls: Sequence[str], deadline: float) -> dict[str, str]:
    gate = asyncio.Semaphore(_AT_ONCE)
    met = await asyncio.gather(*(_find(url, gate, deadline) for url in urls))
    return {url: words for url, words in zip(urls, met, strict=True) if words is not None}


async def _find(url: str, gate: asyncio.Semaphore, deadline: float) -> str | None:
    """Return what the last connection met; None once the host has answered."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    while True:
        async with gate:
            met = await _try(parts.hostname or "", port)
        if met is None or running_time() > deadline:
            return met
        await asyncio.sleep(_PAUSE_S)


async def _try(host: str, port: int) -> str | None:
    """Connect once, to the first address of the host that answers."""
    loop, met = asyncio.get_running_loop(), None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"no address: {error.strerror}"
    for family, *_, address in found:
        try:
            with socket.socket(family) as connection:
                connection.setblocking(False)
                await asyncio.wait_for(loop.sock_connect(connection, address), _ATTEMPT_S)
                return None
        except asyncio.TimeoutError:
            met = met or "no answer"
        except OSError as error:
            if is_answer_of_host(error):
                return None
            met = met or os.strerror(error.errno or 0)
    return met
