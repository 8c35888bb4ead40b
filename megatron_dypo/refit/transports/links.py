"""The way of bytes from one trainer rank (source) to one rank of a server (server rank), whatever carries them.

A link has one order: messages are taken in the order in which they were posted, and both ends know their sizes. A few
are under way at a time (``DEPTH``), so that packing, sending and unpacking overlap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from megatron_dypo.refit.deadline import Deadline

DEPTH = 3
"""Messages under way on a link at most, and staging buffers on each end."""


class LinkError(RuntimeError):
    """The other end of a link was lost, or did not keep the deadline."""


class Outgoing(ABC):
    """The source's end of a link, for one refit."""

    @abstractmethod
    def stage(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 to fill and then :meth:`post`; waits until a buffer is free.

        Raises:
            LinkError: see the class; so do the others.
        """

    @abstractmethod
    def post(self, payload: Tensor) -> None:
        """Send a staged buffer, or any contiguous uint8 tensor, which must not change until :meth:`drain` returns."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until everything posted has left, and all buffers are free."""


class Incoming(ABC):
    """The server rank's end of a link, for one refit. Call ``expect`` up to DEPTH times ahead, then ``take`` and ``release``."""

    @abstractmethod
    def expect(self, num_bytes: int, into: Tensor | None) -> None:
        """Announce the next message: to be written to ``into`` (contiguous uint8), or None: to a staging buffer."""

    @abstractmethod
    def take(self) -> Tensor:
        """Wait for the oldest expected message; its bytes are good until :meth:`release`.

        Raises:
            LinkError: see the class.
        """

    @abstractmethod
    def release(self) -> None:
        """The taken message was used; its buffer may take another."""


@dataclass(frozen=True, kw_only=True)
class ServerLinks:
    """The links to one server, as both ends describe them."""

    store: dist.Store
    """Where the ends find each other."""
    server: int
    sources: tuple[int, ...]
    """The trainer ranks that send to the server, ascending."""
    num_server_ranks: int
    slot_bytes: int
    """Size of one staging buffer: the limit of a message."""


class Sender(ABC):
    """A source's ends of its links to one server; kept between refits."""

    @classmethod
    @abstractmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> Self:
        """Meet the ranks of the server. With several servers: in ascending order, lest two half-made connections wait
        for each other.

        Raises:
            LinkError: somebody did not come.
        """

    @abstractmethod
    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        """The link to one rank of the server."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections at once; server ranks that wait get an error."""


class Receiver(ABC):
    """A server rank's ends of all its links; kept between refits."""

    @classmethod
    @abstractmethod
    def connect(cls, links: ServerLinks, server_rank: int, deadline: Deadline) -> Self:
        """Meet the sources.

        Raises:
            LinkError: somebody did not come.
        """

    @abstractmethod
    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        """The link from one trainer rank."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections at once; sources that wait get an error."""
