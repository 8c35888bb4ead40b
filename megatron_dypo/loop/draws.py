"""The draws of one replica: the next prompts, and those that are drawn but not finished."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.types import DropReason, Prompt


class PromptSource(Protocol):
    """The run's endless sequence of draws; see :class:`megatron_dypo.data.prompts.PromptStream`."""

    def __len__(self) -> int: ...

    def at(self, positions: Sequence[int]) -> tuple[list[Prompt], DropCounts]: ...

    def id_of(self, position: int) -> str: ...


@dataclass(kw_only=True)
class Draws:
    """A replica's place in the run's sequence of draws. The replica takes every ``replicas``-th draw.

    The thread of a rollout stream calls :meth:`claim` under the stream's lock. Code that reads ``cursor``,
    ``unfinished`` and the ledger together must hold that lock
    (:meth:`megatron_dypo.rollout.stream.RolloutStream.still`).
    """

    source: PromptSource
    ledger: Ledger
    replica: int = 0
    replicas: int = 1
    cursor: int = 0
    """Position of the next draw. Replicas that collect in the background have different positions."""
    unfinished: list[Prompt] = field(default_factory=list)
    """Prompts that this run, or the run that it resumes, drew and neither graded nor dropped. A stream keeps its
    own."""
    left_out: deque[DropCounts] = field(default_factory=deque)
    """Counts of prompts and traces that draws left out and that are on no account yet."""

    def claim(self, count: int) -> range:
        """Make the next ``count`` draws of the run; return the positions of this replica's part."""
        start = self.cursor
        self.cursor += count
        own = range(start + (self.replica - start) % self.replicas, start + count, self.replicas)
        self.ledger.draw(len(own))
        return own

    def take(self, count: int) -> list[Prompt]:
        """Make the next ``count`` draws of the run; return this replica's prompts."""
        prompts, left_out = self.source.at(self.claim(count))
        self.left_out.append(left_out)
        return prompts

    def begin_round(self, count: int) -> list[Prompt]:
        """Return the unfinished prompts, then this replica's part of ``count`` more; all are unfinished from now on.

        So no prompt is lost if the run ends before :meth:`end_round`.
        """
        self.unfinished = [*self.unfinished, *self.take(count)]
        return self.unfinished

    def are_open(self, orders: Collection[int]) -> bool:
        """Return whether each of this replica's draws is either unfinished or not made yet."""
        known = {prompt.order for prompt in self.unfinished}
        return all(order >= self.cursor or order in known for order in orders)

    def begin_listed(self, orders: Collection[int]) -> list[Prompt]:
        """Draw as far as these open draws of this replica; return their prompts. All are unfinished from now on."""
        if orders and max(orders) >= self.cursor:
            self.begin_round(max(orders) + 1 - self.cursor)
        wanted = set(orders)
        return [prompt for prompt in self.unfinished if prompt.order in wanted]

    def end_listed(self, orders: Collection[int]) -> None:
        """Forget these unfinished prompts: each is on an account."""
        ended = set(orders)
        self.unfinished = [prompt for prompt in self.unfinished if prompt.order not in ended]

    def end_round(self) -> None:
        """Forget the unfinished prompts: each is on an account, or a stream has taken them over."""
        self.unfinished = []

    def resume(self, cursor: int, unfinished: Sequence[int]) -> None:
        """Continue from a checkpoint; ``unfinished`` are the orders of all replicas."""
        self.cursor = cursor
        mine = [order for order in unfinished if order % self.replicas == self.replica]
        self.unfinished, left_out = self.source.at(mine)
        self.left_out.append(left_out)

    def ledger_with_left_out(self) -> Ledger:
        """Return the ledger with the prompts of ``left_out``, for a checkpoint."""
        too_long = sum(left_out.prompts for left_out in self.left_out)
        return self.ledger + Ledger(dropped=Counter({DropReason.TOO_LONG: too_long}))
