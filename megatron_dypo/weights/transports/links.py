"""The way of bytes from one trainer rank (source) to one rank of a server (target), whatever carries them.

A link has one order: messages are taken in the order in which they were posted, and both ends know their sizes. A few
are under way at a time (``DEPTH``), so that packing, sending and unpacking overlap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from megatron_dypo.weights.deadline import Deadline

DEPTH = 3
"""Messages under way on a link at most, and staging buffers on each end."""


class LinkError(RuntimeError):
    """The other end of a link was lost, or did not keep the deadline."""


class Outgoing(ABC):
    """The source's end of a link, for one push."""

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
    """The target's end of a link, for one push. Call ``expect`` up to DEPTH times ahead, then ``take`` and ``release``."""

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


class Sender(ABC):
    """All links of one source; kept between pushes."""

    @abstractmethod
    def outgoing(self, engine: int, target: int, deadline: Deadline) -> Outgoing:
        """The link to one rank of one engine."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections at once; targets that wait get an error."""


class Receiver(ABC):
    """All links of one target; kept between pushes."""

    @abstractmethod
    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        """The link from one trainer rank."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections at once; sources that wait get an error."""
