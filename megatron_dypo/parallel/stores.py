"""TCP stores of torch.distributed that no other host reaches without a key.

torch's own way, ``TCPStore(host, port, is_master=True)``, listens on all addresses whatever ``host`` says. Here the
store gets a listener that is bound already.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import secrets
import socket
import struct
import weakref
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_dypo.parallel.doors import LOOPBACK, Door, Tunnel
from megatron_dypo.parallel.interfaces import is_loopback

_SO_ATTACH_FILTER = 26
"""Linux, asm-generic/socket.h; Python's socket module does not name it."""
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A program of the kernel's packet filter: BPF_RET | BPF_K with 0 bytes, which drops every packet."""


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """The place at which another process finds a store."""

    host: str
    port: int
    key: str = field(default="", repr=False)
    """Key of the door at this address. Empty: the store itself is there, for processes of this host."""


class ServedStore:
    """A store that this process serves, and its address for other processes."""

    def __init__(self, host: str, timeout: datetime.timedelta, *, port: int = 0, key: str = "") -> None:
        """Serve a store on a loopback address, and through a door at ``host`` unless that is a loopback address too.

        Args:
            port: of the door; 0 takes any free one.
            key: of the door; empty makes a random one.

        Raises:
            OSError: the port is taken, or ``host`` is no address of this machine.
        """
        self.store, listener = _store_at(LOOPBACK, None, timeout)
        listener.close()
        self.address = StoreAddress(host=LOOPBACK, port=self.store.port)
        if is_loopback(host) and not key:
            return
        key = key or secrets.token_hex(32)
        door = Door(host, port, key, self.store.port)
        weakref.finalize(self, door.close)
        self.address = StoreAddress(host=host, port=door.port, key=key)


def reach_store(address: StoreAddress, timeout: datetime.timedelta) -> dist.TCPStore:
    """Return a client of another process's store. Keep a reference as long as new connections may be made from it.

    Raises:
        TimeoutError: the door did not open in time.
        KeyRefusedError: the door has another key.
        RuntimeError: no store is there.
    """
    if not address.key:
        return dist.TCPStore(address.host, address.port, None, False, timeout=timeout)
    tunnel = Tunnel(address.host, address.port, address.key, patience_s=timeout.total_seconds())
    store = dist.TCPStore(LOOPBACK, tunnel.port, None, False, timeout=timeout)
    weakref.finalize(store, tunnel.close)
    return store


class OpenStore:
    """A store without a key at one address, for clients that know no key. :meth:`lock` shuts it to new ones."""

    def __init__(self, host: str, world_size: int, timeout: datetime.timedelta) -> None:
        """Raises OSError: ``host`` is no address of this machine."""
        self.store, self._listener = _store_at(host, world_size, timeout)

    def lock(self) -> None:
        """Let the kernel drop packets of new connections from now on (Linux). Open connections stay."""
        buffer = ctypes.create_string_buffer(_RETURN_NOTHING, len(_RETURN_NOTHING))
        program = struct.pack("HL", 1, ctypes.addressof(buffer))  # struct sock_fprog, with its padding
        self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _store_at(host: str, world_size: int | None, timeout: datetime.timedelta) -> tuple[dist.TCPStore, socket.socket]:
    """Make a store that listens at this address alone; return it with a second handle of its listener."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        second = listener.dup()
        descriptor = os.dup(listener.fileno())  # the store's own, which it closes
    store = dist.TCPStore(
        host, port, world_size, True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )
    return store, second
