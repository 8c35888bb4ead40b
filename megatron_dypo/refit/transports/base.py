"""The interface of every transport: an open connection to some servers, which brings weights in steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from megatron_dypo.refit.deadline import Deadline

Step = Callable[[], int | None] | None
"""One rank's part of a step: an action that returns the bytes that it sent or wrote, if any; None: nothing to do."""


class Connection(ABC):
    """An open way from the trainer's shards into the parameters of some servers, kept between refits."""

    @abstractmethod
    def steps(self, version: int, deadline: Deadline) -> Iterator[Step]:
        """Yield this rank's part of each step that brings every tensor to every server.

        The servers must be paused. All ranks yield equally many steps, and run each in lockstep before they ask for the
        next one. After a step that fails some servers may be changed and some not: :meth:`abort` the connection.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection at once, so that no server waits for us. Not collective; the last call."""

    @abstractmethod
    def close(self) -> None:
        """Leave the servers in order: at the end of a run, or before a connection to other servers. Not collective."""
