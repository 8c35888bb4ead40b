"""Doors and tunnels: one host's port, open to those processes on other hosts that know a key.

torch's TCP store asks nobody for a key. So it listens on a loopback address only, and a :class:`Door` on the network
passes connections on to it, from a :class:`Tunnel` on another host. Both ends prove that they know the key before a
byte passes (HMAC-SHA256 over fresh random numbers). The bytes themselves are not encrypted. To a connection without the
key a door sends nothing.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_NUMBER_BYTES = 32
_PROOF_BYTES = 32
_PROOF_WAIT_S = 10.0
"""Longest time for a connection, and for a proof that the other end knows the key."""
_RETRY_S = 0.2
"""Seconds between two attempts to reach a door, since its host does not announce that it has opened it."""
CHUNK_BYTES = 2**16
LOOPBACK = "127.0.0.1"

log = logging.getLogger(__name__)


class KeyRefusedError(RuntimeError):
    """The other end does not have the same key."""


class Door:
    """A listener at ``host`` that passes connections with the key on to ``target_port`` of this host."""

    def __init__(self, host: str, port: int, key: str, target_port: int) -> None:
        """Listen. ``port`` 0 takes any free port; ``host`` "" takes all addresses.

        Raises:
            OSError: the port is taken, or ``host`` is no address of this machine.
        """
        self._key, self._target_port = key.encode(), target_port
        self._server = run_in_loop(listen(self._pass_on, host, port))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening. Open connections stay."""
        loop_of_doors().call_soon_threadsafe(self._server.close)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.wait_for(_admit(reader, writer, self._key), _PROOF_WAIT_S)
        except (KeyRefusedError, asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
            log.warning("a connection from %s to port %d had no key", writer.get_extra_info("peername"), self.port)
            writer.close()
            return
        await join_to(reader, writer, functools.partial(asyncio.open_connection, LOOPBACK, self._target_port))


class Tunnel:
    """A port of this host that leads through a :class:`Door` on another host."""

    def __init__(self, host: str, port: int, key: str, *, patience_s: float) -> None:
        """Wait until the door opens, show it the key, and listen on a loopback address.

        Raises:
            TimeoutError: the door did not open within ``patience_s``.
            KeyRefusedError: the door has another key.
        """
        self._reach = functools.partial(_enter, host, port, key.encode())
        run_in_loop(_await_door(self._reach, f"{host}:{port}", patience_s))
        self._server = run_in_loop(listen(self._lead, LOOPBACK, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening. Open connections stay."""
        loop_of_doors().call_soon_threadsafe(self._server.close)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await join_to(reader, writer, self._reach)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def listen(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], host: str, port: int
) -> asyncio.Server:
    # Bound here: for a name with several addresses asyncio would take a different free port for each.
    family, kind, _, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return await asyncio.start_server(serve, sock=listener, backlog=1024)
    except BaseException:
        listener.close()
        raise


async def _admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """Answer one who knows the key; raise KeyRefusedError for another before anything is sent."""
    theirs = await reader.readexactly(_NUMBER_BYTES)
    _require(await reader.readexactly(_PROOF_BYTES), prove(key, b"knocks", theirs))
    ours = secrets.token_bytes(_NUMBER_BYTES)
    writer.write(ours + prove(key, b"opens", theirs, ours))
    _require(await reader.readexactly(_PROOF_BYTES), prove(key, b"enters", theirs, ours))


async def _enter(host: str, port: int, key: bytes) -> Streams:
    """Connect to a door, and prove that this end knows the key.

    Raises:
        KeyRefusedError: the door closed the connection, or does not know the key itself.
        OSError: nothing listens there.
    """
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _PROOF_WAIT_S)
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"no connection in {_PROOF_WAIT_S:g} s") from error
    ours = secrets.token_bytes(_NUMBER_BYTES)
    try:
        writer.write(ours + prove(key, b"knocks", ours))
        theirs = await asyncio.wait_for(reader.readexactly(_NUMBER_BYTES), _PROOF_WAIT_S)
        proof = await asyncio.wait_for(reader.readexactly(_PROOF_BYTES), _PROOF_WAIT_S)
        _require(proof, prove(key, b"opens", ours, theirs))
        writer.write(prove(key, b"enters", ours, theirs))
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError) as error:
        writer.close()
        raise KeyRefusedError(f"{host}:{port} does not accept the key") from error
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _await_door(reach: Callable[[], Awaitable[Streams]], name: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            _, writer = await reach()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing answers at {name} after {patience_s:g} s: {error}") from error
            await asyncio.sleep(_RETRY_S)
        else:
            writer.close()
            return


def prove(key: bytes, *parts: bytes) -> bytes:
    """Return 32 bytes that only one who knows the key can compute."""
    return hmac.digest(key, b"\0".join(parts), "sha256")


def _require(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise KeyRefusedError("the other end has another key")


async def join_to(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reach: Callable[[], Awaitable[Streams]]
) -> None:
    """Copy bytes both ways between a connection and the one that ``reach`` opens, until either end closes."""
    try:
        far_reader, far_writer = await reach()
    except (OSError, KeyRefusedError) as error:
        log.warning("a connection leads nowhere: %s", error)
        writer.close()
        return
    copies = [asyncio.ensure_future(_copy(reader, far_writer)), asyncio.ensure_future(_copy(far_reader, writer))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        writer.close()
        far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:  # the connection broke, which ends it like an orderly close
        return


@functools.cache
def loop_of_doors() -> asyncio.AbstractEventLoop:
    """Return the event loop of all doors and tunnels of this process, in a daemon thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="doors", daemon=True).start()
    return loop


def run_in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, loop_of_doors()).result()
