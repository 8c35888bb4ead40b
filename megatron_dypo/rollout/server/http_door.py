"""A listener in front of an HTTP server of this host: it lets through who knows the key, and tells others its health.

sglang-router asks for its key on some routes only, and on others it asks its servers with that key. So it listens on a
loopback address, and this door on the network. The door reads the head of the first request of a connection. With the
key, all bytes of the connection pass both ways from then on, so that streams and closed connections are as without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac

from megatron_dypo.parallel.doors import CHUNK_BYTES, LOOPBACK, Streams, join_to, listen, loop_of_doors, run_in_loop

HEALTH = ("/health", "/liveness", "/readiness")
"""Paths that everybody may ask for; the answer is the server's status without its text."""
_HEAD_WAIT_S = 10.0
_GOODBYE_S = 1.0
"""Seconds in which the rest of a refused request is read, so that the refusal arrives."""


class HttpDoor:
    """A listener at ``host`` and ``port`` that passes connections with the key on to ``target_port`` of this host."""

    def __init__(self, host: str, port: int, key: str, target_port: int) -> None:
        """Listen.

        Raises:
            OSError: the port is taken, or ``host`` is no address of this machine.
        """
        self._key, self._target_port = key.encode(), target_port
        self._server = run_in_loop(listen(self._serve, host, port))

    def close(self) -> None:
        """Stop listening. Open connections stay."""
        loop_of_doors().call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_WAIT_S)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, OSError):
            writer.close()
            return
        if _knows(head, self._key):
            await join_to(reader, writer, functools.partial(self._reach, head))
            return
        path = _path(head)
        await _answer(reader, writer, await self._health(path) if path in HEALTH else b"401 Unauthorized")

    async def _reach(self, head: bytes) -> Streams:
        reader, writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        writer.write(head)
        return reader, writer

    async def _health(self, path: str) -> bytes:
        """Return the status of the server's answer, such as ``200 OK``."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            reader, writer = await self._reach(f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode())
            try:
                return (await asyncio.wait_for(reader.readline(), _HEAD_WAIT_S)).partition(b" ")[2].strip()
            finally:
                writer.close()
        return b"503 Service Unavailable"


def _path(head: bytes) -> str:
    """Return the path that a GET asks for, "" for another method."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    return words[1].partition(b"?")[0].decode("latin-1") if len(words) == 3 and words[0] == b"GET" else ""


def _knows(head: bytes, key: bytes) -> bool:
    """Return whether the head of a request holds the key (``Authorization: Bearer KEY``)."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"authorization":
            scheme, _, shown = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), key):
                return True
    return False


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: bytes) -> None:
    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        writer.write_eof()
        await asyncio.wait_for(_swallow(reader), _GOODBYE_S)
    writer.close()


async def _swallow(reader: asyncio.StreamReader) -> None:
    while await reader.read(CHUNK_BYTES):
        pass
