"""The draws of one replica: which prompts come next, and which are drawn and not finished."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
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
    """A replica's place in the run's sequence of draws, of which it takes every ``replicas``-th.

    The thread of a rollout stream calls :meth:`claim` under the stream's lock; whoever reads ``cursor``, ``unfinished``
    and the ledger together holds that lock (:meth:`megatron_dypo.rollout.stream.RolloutStream.still`).
    """

    source: PromptSource
    ledger: Ledger
    replica: int = 0
    replicas: int = 1
    cursor: int = 0
    """Position of the next draw; replicas that collect in the background are not in step."""
    unfinished: list[Prompt] = field(default_factory=list)
    """Drawn, and neither graded nor dropped; by the run that this one resumes, too. A stream keeps its own."""
    left_out: deque[DropCounts] = field(default_factory=deque)
    """Prompts and traces that draws left out and that are on no account yet."""

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

        So an end of the run before :meth:`end_round` loses none.
        """
        self.unfinished = [*self.unfinished, *self.take(count)]
        return self.unfinished

    def end_round(self) -> None:
        """Forget the unfinished prompts: what became of each is known, or a stream has taken them over."""
        self.unfinished = []

    def resume(self, cursor: int, unfinished: Sequence[int]) -> None:
        """Go on where a checkpoint left off; ``unfinished`` are the orders of all replicas."""
        self.cursor = cursor
        mine = [order for order in unfinished if order % self.replicas == self.replica]
        self.unfinished, left_out = self.source.at(mine)
        self.left_out.append(left_out)

    def ledger_with_left_out(self) -> Ledger:
        """Return the ledger with the prompts of ``left_out``, for a checkpoint."""
        too_long = sum(left_out.prompts for left_out in self.left_out)
        return self.ledger + Ledger(dropped=Counter({DropReason.TOO_LONG: too_long}))
