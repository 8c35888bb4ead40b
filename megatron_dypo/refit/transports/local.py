"""Links between processes on one host: shared buffers, and a Unix socket that tells which buffers are full or free.

The socket carries one byte for each full buffer, and one byte back for each freed one. If it closes, the other side is
lost. A trainer rank listens in a folder that only this user can enter, until all its server ranks have connected. The
folder may have a long name (TMPDIR), but the address of a Unix socket has at most 107 bytes. So sockets are bound and
reached through an open descriptor of the folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from megatron_dypo.parallel import device
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.closing import describe, shut
from megatron_dypo.refit.transports.links import DEPTH, Incoming, LinkError, Outgoing, Receiver, Sender, ServerLinks
from megatron_dypo.refit.transports.rings import Ring, make_ring, open_ring

_DESCRIPTORS = Path("/proc/self/fd")
_FULL, _FREE = b"f", b"e"


class Channel:
    """One link's socket and ring."""

    def __init__(self, connection: socket.socket, ring: Ring) -> None:
        self._connection = connection
        self.ring = ring

    def send_byte(self, what: bytes, deadline: Deadline) -> None:
        """Send one byte. Raises LinkError if that fails."""
        try:
            self._connection.settimeout(deadline.remaining())
            self._connection.sendall(what)
        except OSError as error:  # includes TimeoutError
            raise LinkError(f"shared memory: {describe(error)}") from error

    def receive_byte(self, what: bytes, deadline: Deadline) -> None:
        """Wait for one byte. Raises LinkError if a different byte or none comes."""
        try:
            self._connection.settimeout(deadline.remaining())
            received = self._connection.recv(1)
        except OSError as error:
            raise LinkError(f"shared memory: {describe(error)}") from error
        if received != what:
            raise LinkError(
                f"shared memory: received {received!r}, not {what!r}" if received else "shared memory: closed by peer"
            )

    def close(self) -> None:
        shut(self._connection)
        self.ring.close()


class LocalSender(Sender):
    """One ring for each rank of the server."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self._channels = dict(channels)

    @classmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> LocalSender:
        channels: dict[int, Channel] = {}
        try:
            with (
                tempfile.TemporaryDirectory(prefix="megatron-dypo-") as folder,
                socket.socket(socket.AF_UNIX) as listener,
            ):
                path = Path(folder) / "refit"
                with _address(path) as address:
                    listener.bind(address)
                listener.listen(links.num_server_ranks)
                links.store.set(_path_key(links, rank), str(path))
                while len(channels) < links.num_server_ranks:
                    server_rank, channel = _accept(listener, links.slot_bytes, deadline)
                    channels[server_rank] = channel
        except OSError as error:
            _close(channels.values())
            missing = sorted(set(range(links.num_server_ranks)) - channels.keys())
            raise LinkError(f"shared memory: ranks {missing} did not come: {describe(error)}") from error
        return cls(channels)

    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        return LocalOutgoing(self._channels[server_rank], deadline)

    def close(self) -> None:
        _close(self._channels.values())


class LocalReceiver(Receiver):
    """One ring for each trainer rank that sends to this rank."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self._channels = dict(channels)

    @classmethod
    def connect(cls, links: ServerLinks, server_rank: int, deadline: Deadline) -> LocalReceiver:
        channels: dict[int, Channel] = {}
        for source in links.sources:
            path = links.store.get(_path_key(links, source)).decode()
            try:
                channels[source] = _connect(path, server_rank, links.slot_bytes, deadline)
            except OSError as error:
                _close(channels.values())
                raise LinkError(f"shared memory of trainer rank {source}: {path}: {describe(error)}") from error
        return cls(channels)

    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        return LocalIncoming(self._channels[source], deadline)

    def close(self) -> None:
        _close(self._channels.values())


class LocalOutgoing(Outgoing):
    """The sending end of one link through shared memory."""

    def __init__(self, channel: Channel, deadline: Deadline) -> None:
        self._channel = channel
        self._deadline = deadline
        self._num_posted = 0
        self._num_freed = 0

    def stage(self, num_bytes: int) -> Tensor:
        self._wait_below(DEPTH)
        return self._channel.ring.slots[self._num_posted % DEPTH, :num_bytes]

    def post(self, payload: Tensor) -> None:
        slot = self.stage(payload.numel())
        if slot.data_ptr() != payload.data_ptr():
            slot.copy_(payload)
        device.synchronize_stream()  # the other process has its own streams
        self._channel.send_byte(_FULL, self._deadline)
        self._num_posted += 1

    def drain(self) -> None:
        self._wait_below(1)

    def _wait_below(self, limit: int) -> None:
        while self._num_posted - self._num_freed >= limit:
            self._channel.receive_byte(_FREE, self._deadline)
            self._num_freed += 1


class LocalIncoming(Incoming):
    """The receiving end of one link through shared memory."""

    def __init__(self, channel: Channel, deadline: Deadline) -> None:
        self._channel = channel
        self._deadline = deadline
        self._expected: deque[tuple[int, Tensor | None]] = deque()
        self._num_taken = 0

    def expect(self, num_bytes: int, into: Tensor | None) -> None:
        self._expected.append((num_bytes, into))

    def take(self) -> Tensor:
        num_bytes, into = self._expected.popleft()
        self._channel.receive_byte(_FULL, self._deadline)
        slot = self._channel.ring.slots[self._num_taken % DEPTH, :num_bytes]
        self._num_taken += 1
        return slot if into is None else into.copy_(slot)

    def release(self) -> None:
        device.synchronize_stream()
        self._channel.send_byte(_FREE, self._deadline)


def _path_key(links: ServerLinks, source: int) -> str:
    return f"socket/{links.server}/{source}"


def _accept(listener: socket.socket, slot_bytes: int, deadline: Deadline) -> tuple[int, Channel]:
    """Wait for the next server rank to connect, and give it a new ring."""
    listener.settimeout(deadline.remaining())
    connection, _ = listener.accept()
    connection.settimeout(deadline.remaining())
    server_rank = int(connection.recv(64))
    ring = make_ring(DEPTH, slot_bytes)
    socket.send_fds(connection, [ring.offer.encode()], [] if ring.fd is None else [ring.fd])
    return server_rank, Channel(connection, ring)


def _connect(path: str, server_rank: int, slot_bytes: int, deadline: Deadline) -> Channel:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(deadline.remaining())
    with _address(Path(path)) as address:
        connection.connect(address)
    connection.sendall(str(server_rank).encode())
    offer, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    if not offer:
        raise ConnectionError("closed by peer")
    return Channel(connection, open_ring(offer.decode(), fds[0] if fds else None, DEPTH, slot_bytes))


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """Yield a short address for the socket at ``path``, for a path of any length (Linux)."""
    if not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(_DESCRIPTORS / str(folder) / path.name)
    finally:
        os.close(folder)


def _close(channels: Iterable[Channel]) -> None:
    for channel in channels:
        channel.close()
