"""Links: one carries bytes from one trainer rank to one server rank, over a network or through shared memory.

Messages are received in the order in which they were posted, and both ends know their sizes. Up to ``DEPTH`` messages
are in flight at a time, so that packing, sending and unpacking overlap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from megatron_dypo.refit.deadline import Deadline

DEPTH = 3
"""Most messages in flight on a link, and the number of staging buffers on each end."""


class LinkError(RuntimeError):
    """The other end of a link was lost or missed the deadline."""


class Outgoing(ABC):
    """The trainer rank's end of a link, for one refit. All methods raise LinkError if the other end is lost or late."""

    @abstractmethod
    def stage(self, num_bytes: int) -> Tensor:
        """Wait for a free buffer; return [num_bytes] uint8 of it, to fill and then :meth:`post`."""

    @abstractmethod
    def post(self, payload: Tensor) -> None:
        """Send a staged buffer or any contiguous uint8 tensor. It must not change until :meth:`drain` returns."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until everything posted has left and all buffers are free."""


class Incoming(ABC):
    """The server rank's end of a link, for one refit. For each message call ``expect`` (up to DEPTH messages ahead),
    then ``take``, then ``release``.

    All methods raise LinkError if the other end is lost or late.
    """

    @abstractmethod
    def expect(self, num_bytes: int, into: Tensor | None) -> None:
        """Announce the next message. It is received into ``into`` (contiguous uint8), or (None) a staging buffer."""

    @abstractmethod
    def take(self) -> Tensor:
        """Wait for the oldest expected message and return its bytes, which are valid until :meth:`release`."""

    @abstractmethod
    def release(self) -> None:
        """Free the buffer of the taken message."""


@dataclass(frozen=True, kw_only=True)
class ServerLinks:
    """The links to one server, as both ends describe them."""

    store: dist.Store
    """The store on which the ends find each other."""
    store_host: str
    """Host of the store, as a server rank reaches it."""
    server: int
    sources: tuple[int, ...]
    """The trainer ranks that send to the server, ascending."""
    num_server_ranks: int
    peers: tuple[int, ...]
    """The ranks at the other end to which this rank has a link, ascending: server ranks, or trainer ranks."""
    most_of_a_rank: int
    """Number of links of the rank, of trainer and all servers, that has the most."""
    slot_bytes: int
    """Size of one staging buffer, and so the largest size of a message."""


class Sender(ABC):
    """A trainer rank's ends of its links to one server; kept between refits."""

    @classmethod
    @abstractmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> Self:
        """Connect with the ranks of the server. Several servers must be connected in ascending order. Otherwise two
        half-made connections would wait for each other.

        Raises:
            LinkError: a server rank did not come.
        """

    @abstractmethod
    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        """Return the link to one rank of the server."""

    @abstractmethod
    def close(self) -> None:
        """Close all links at once; server ranks that wait get an error."""


class Receiver(ABC):
    """A server rank's ends of all its links; kept between refits."""

    @classmethod
    @abstractmethod
    def connect(cls, links: ServerLinks, server_rank: int, deadline: Deadline) -> Self:
        """Connect with the trainer ranks that send to this rank.

        Raises:
            LinkError: a trainer rank did not come.
        """

    @abstractmethod
    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        """Return the link from one trainer rank."""

    @abstractmethod
    def close(self) -> None:
        """Close all links at once; trainer ranks that wait get an error."""
