"""Links between CPUs: one TCP connection from each trainer rank to each server rank that it sends to.

Each carries the bytes of one link and nothing else. gloo takes about twice as long for the same messages, now and then
misses the loss of the other end, and asks nobody for a key.

A server rank listens until its trainer ranks have connected, at its address towards the trainer's store. Address and a
new random key are in that store, and each end proves that it knows the key. The bytes are not encrypted.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import logging
import secrets
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta

import torch
from torch import Tensor

from megatron_dypo.parallel.doors import prove
from megatron_dypo.parallel.interfaces import address_towards
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.closing import describe, shut
from megatron_dypo.refit.transports.links import Incoming, LinkError, Outgoing, Receiver, Sender, ServerLinks

_BUFFER_BYTES = 2**18
"""The kernel's buffers of a connection: the fastest of 128 KiB to 4 MiB by ``benchmarks/refit.py``. From larger ones,
and those that the kernel would choose, bytes have left the processor's caches before they are read."""
_PROOF_WAIT_S = 5.0
"""Longest wait for the proof of whoever has connected. A trainer rank sends its own at once."""
_PROOF_BYTES = 32
_RANK_BYTES = 4

log = logging.getLogger(__name__)


class Connection:
    """One link's connection. All methods but ``close`` raise LinkError if the other end is lost or late."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        _set_buffers(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the last bytes of a message would wait

    def send(self, payload: Tensor, deadline: Deadline) -> None:
        """Send contiguous uint8; return when the kernel has all of it."""
        with _as_link_errors("TCP"):
            _limit(self._socket, socket.SO_SNDTIMEO, deadline)
            self._socket.sendall(payload.numpy().data)

    def receive(self, into: Tensor, deadline: Deadline) -> None:
        """Fill ``into``, contiguous uint8."""
        with _as_link_errors("TCP"):
            _fill(self._socket, into.numpy().data, deadline)

    def close(self) -> None:
        """Close both directions; a thread that waits in the connection gets an error."""
        shut(self._socket)


class TcpSender(Sender):
    """A trainer rank's connections to the ranks of one server."""

    def __init__(self, connections: Mapping[int, Connection], links: ServerLinks) -> None:
        self._connections = dict(connections)
        self._links = links

    @classmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> TcpSender:
        connections: dict[int, Connection] = {}
        with _closing_on_error(connections):
            for server_rank in links.peers:
                with _as_link_errors(f"rank {server_rank}"):
                    connections[server_rank] = _connect(links, rank, server_rank, deadline)
        return cls(connections, links)

    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        return TcpOutgoing(self._connections[server_rank], self._links.slot_bytes, deadline)

    def close(self) -> None:
        _close(self._connections.values())


class TcpReceiver(Receiver):
    """A server rank's connections from the trainer ranks that send to it."""

    def __init__(self, connections: Mapping[int, Connection], links: ServerLinks) -> None:
        self._connections = dict(connections)
        self._links = links

    @classmethod
    def connect(cls, links: ServerLinks, server_rank: int, deadline: Deadline) -> TcpReceiver:
        connections: dict[int, Connection] = {}
        host, key = address_towards(links.store_host), secrets.token_bytes(_PROOF_BYTES)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with (
            _closing_on_error(connections),
            _as_link_errors("TCP"),
            socket.create_server((host, 0), family=family, backlog=max(len(links.peers), 128)) as listener,
        ):
            _set_buffers(listener)  # accepted connections begin with them
            place = {"host": host, "port": listener.getsockname()[1], "key": key.hex()}
            links.store.set(_place_key(links, server_rank), json.dumps(place))
            while missing := [source for source in links.peers if source not in connections]:
                listener.settimeout(deadline.remaining())
                try:
                    came, _ = listener.accept()
                except TimeoutError as error:
                    raise TimeoutError(f"trainer ranks {missing} did not come") from error
                if (source := _admit(came, key, missing)) is not None:
                    connections[source] = Connection(came)
        return cls(connections, links)

    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        return TcpIncoming(self._connections[source], self._links.slot_bytes, deadline)

    def close(self) -> None:
        _close(self._connections.values())


class _End:
    """One end of a link, for one refit. Only one message is under way, so one staging buffer is enough."""

    def __init__(self, connection: Connection, slot_bytes: int, deadline: Deadline) -> None:
        self._connection = connection
        self._slot_bytes = slot_bytes
        self._deadline = deadline

    @functools.cached_property
    def _slot(self) -> Tensor:
        return torch.empty(self._slot_bytes, dtype=torch.uint8)


class TcpOutgoing(_End, Outgoing):
    """The sending end of one link. What was posted has left."""

    def stage(self, num_bytes: int) -> Tensor:
        return self._slot[:num_bytes]

    def post(self, payload: Tensor) -> None:
        self._connection.send(payload, self._deadline)

    def drain(self) -> None:
        """Do nothing: what was posted has left."""


class TcpIncoming(_End, Incoming):
    """The receiving end of one link. A message is read when it is taken."""

    def __init__(self, connection: Connection, slot_bytes: int, deadline: Deadline) -> None:
        super().__init__(connection, slot_bytes, deadline)
        self._expected: deque[tuple[int, Tensor | None]] = deque()

    def expect(self, num_bytes: int, into: Tensor | None) -> None:
        self._expected.append((num_bytes, into))

    def take(self) -> Tensor:
        num_bytes, into = self._expected.popleft()
        into = self._slot[:num_bytes] if into is None else into
        self._connection.receive(into, self._deadline)
        return into

    def release(self) -> None:
        """Do nothing: the buffer is filled again only by the next :meth:`take`."""


def _connect(links: ServerLinks, rank: int, server_rank: int, deadline: Deadline) -> Connection:
    """Connect to a server rank. Both ends prove that they know the key of its place."""
    place_key = _place_key(links, server_rank)
    links.store.wait([place_key], timedelta(seconds=deadline.remaining()))
    place = json.loads(links.store.get(place_key))
    key, number = bytes.fromhex(place["key"]), rank.to_bytes(_RANK_BYTES, "big")
    connection = socket.create_connection((place["host"], place["port"]), deadline.remaining())
    try:
        connection.settimeout(None)
        connection.sendall(number + prove(key, b"trainer", number))
        answer = bytearray(_PROOF_BYTES)
        _fill(connection, memoryview(answer), deadline)
        if not hmac.compare_digest(answer, prove(key, b"server", number)):
            raise ConnectionError(f"{place['host']}:{place['port']} does not know the key")
        return Connection(connection)
    except BaseException:
        connection.close()
        raise


def _admit(came: socket.socket, key: bytes, missing: Iterable[int]) -> int | None:
    """Return which of the missing trainer ranks has connected; close a connection from anybody else."""
    hello = bytearray(_RANK_BYTES + _PROOF_BYTES)
    with contextlib.suppress(OSError):
        _fill(came, memoryview(hello), Deadline(_PROOF_WAIT_S))
        number, proof = bytes(hello[:_RANK_BYTES]), hello[_RANK_BYTES:]
        source = int.from_bytes(number, "big")
        if source in missing and hmac.compare_digest(proof, prove(key, b"trainer", number)):
            came.sendall(prove(key, b"server", number))
            return source
    log.warning("a connection to the links of a refit had no key")
    came.close()
    return None


def _fill(connection: socket.socket, into: memoryview, deadline: Deadline) -> None:
    """Receive bytes until ``into`` is full. Raises OSError: the other end closed, or the deadline has passed."""
    while into:
        _limit(connection, socket.SO_RCVTIMEO, deadline)
        count = connection.recv_into(into, 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("closed by peer")
        into = into[count:]


def _limit(connection: socket.socket, option: int, deadline: Deadline) -> None:
    """Let the kernel end a call (BlockingIOError) at the deadline. (Python's own time limit polls before each call.)"""
    microseconds = int(1e6 * deadline.remaining()) + 1
    connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(microseconds, 10**6)))


def _set_buffers(connection: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def _place_key(links: ServerLinks, server_rank: int) -> str:
    return f"tcp/{links.server}/{server_rank}"


@contextlib.contextmanager
def _closing_on_error(connections: Mapping[int, Connection]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _close(connections.values())
        raise


@contextlib.contextmanager
def _as_link_errors(of: str) -> Iterator[None]:
    """Raise LinkError in place of the errors of sockets, and of the store that holds their places."""
    try:
        yield
    except BlockingIOError as error:
        raise LinkError(f"{of}: timed out") from error
    except (OSError, RuntimeError) as error:  # OSError includes TimeoutError; a store raises RuntimeError
        raise LinkError(f"{of}: {describe(error)}") from error


def _close(connections: Iterable[Connection]) -> None:
    for connection in connections:
        connection.close()
