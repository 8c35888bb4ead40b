"""The interface of every transport: an open connection to some servers, which sends weights in steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from megatron_dypo.refit.deadline import Deadline

Step = Callable[[], int | None] | None
"""One rank's part of a step: an action that returns the bytes that it sent or wrote, if any. None: nothing to do."""


class Connection(ABC):
    """An open connection from the trainer's shards to the parameters of some servers, kept between refits."""

    @abstractmethod
    def steps(self, version: int, deadline: Deadline) -> Iterator[Step]:
        """Yield this rank's part of each step. Together the steps bring every tensor to every server.

        The servers must be paused. All ranks yield the same number of steps, and run each in lockstep before they ask
        for the next one. If a step fails, some servers may have changed: :meth:`abort` the connection.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection at once, so that no server waits for it. Not collective. No call may follow."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection in an orderly way, at the end of a run or before one to other servers. Not
        collective."""
