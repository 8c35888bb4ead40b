"""The books of a rollout stream: which draws are under way, which have ended, and how."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.types import Prompt

T = TypeVar("T")


@dataclass(kw_only=True)
class StreamCounts:
    """Counts since they were last taken."""

    dropped: list[DroppedGroup] = field(default_factory=list)
    """Prompts without a group, with the reason."""
    left_out: DropCounts = field(default_factory=DropCounts)
    """Counts of draws and traces that are too long or wrong."""
    client: ClientCounts = field(default_factory=ClientCounts)
    """Counts of the client."""


@dataclass(kw_only=True)
class StreamState(Generic[T]):
    """State that the threads of trainer and stream share. The stream's lock guards it."""

    wanted: int = 0
    claimed: list[int] = field(default_factory=list)
    """Orders that are drawn and not yet tokenised."""
    in_flight: dict[int, Prompt] = field(default_factory=dict)
    done: list[tuple[int, T]] = field(default_factory=list)
    """(order, finished group)."""
    useful: int = 0
    """Number of groups in ``done`` that count as wanted ones."""
    counts: StreamCounts = field(default_factory=StreamCounts)
    postponed: deque[Prompt] = field(default_factory=deque)
    """Prompts to sample first."""
    is_unserved: bool = False
    is_stopping: bool = False
    error: BaseException | None = None

    @property
    def unread(self) -> int:
        """Number of draws with an outcome that were not taken."""
        return len(self.done) + len(self.counts.dropped) + self.counts.left_out.prompts

    @property
    def under_way(self) -> int:
        """Number of draws without an outcome."""
        return len(self.claimed) + len(self.in_flight)

    def unfinished(self) -> list[int]:
        """Return the orders of all draws that were not taken, ascending."""
        ended = [order for order, _ in self.done] + [dropped.prompt.order for dropped in self.counts.dropped]
        ended += self.counts.left_out.too_long
        return sorted([*self.claimed, *self.in_flight, *ended, *(prompt.order for prompt in self.postponed)])
