"""A rollout batch as a value: the groups of one collection, and the position of the next minibatch. Pure.

The groups of all replicas, oldest first, form one list of *orders*. Updates go through it ``passes`` times: each
optimizer step takes the next entries as its minibatch. All ranks know the list and the position, so they agree on the
next minibatch and the end of the batch without messages. Each replica holds the samples of its own groups. If the last
minibatch of a pass is too short, it is filled from the next pass.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_dypo.batching.queues import Group, order_of
from megatron_dypo.types import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Minibatch:
    """The groups of one optimizer step: this replica's part."""

    groups: tuple[Group, ...]
    """The groups, oldest first; () on ranks that hold no samples."""
    finished: tuple[Group, ...]
    """The groups for which this is the last update of the batch."""
    is_last: bool
    """Whether this is the last update of the rollout batch."""

    @property
    def samples(self) -> list[Sample]:
        """Return all samples, group after group."""
        return [sample for group in self.groups for sample in group]


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutBatch:
    """The groups that the next updates learn from. Without arguments it is a batch that is used up.

    Args:
        orders: of the groups of all replicas, ascending.
        groups: those that this replica holds; the ones that have entered all their updates are left out.
        passes: times that each group enters an update.
        position: entries of ``passes`` times ``orders`` that minibatches have taken.
        buffered_orders: of the buffered traces of all replicas that make up the last minibatch, ascending; (): none do.
        buffered: those that this replica holds.
    """

    orders: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    passes: int = 1
    position: int = 0
    buffered_orders: tuple[int, ...] = ()
    buffered: tuple[Group, ...] = ()

    @property
    def is_used_up(self) -> bool:
        """Tell whether no minibatch is left, on any replica."""
        return self.position >= self.passes * len(self.orders) and not self.buffered_orders

    def open_orders(self) -> list[int]:
        """Return the orders of the groups with updates left, ascending."""
        return [order for order in self.orders if self.passes_left(order) > 0]

    def passes_left(self, order: int) -> int:
        """Return how many updates the group with ``order`` has left."""
        whole, entered = divmod(self.position, len(self.orders))
        return self.passes - whole - (bisect.bisect_left(self.orders, order) < entered)

    def next_minibatch(self, num_prompts: int) -> tuple[Minibatch, RolloutBatch]:
        """Take the next ``num_prompts`` groups over all replicas; return them and the rest of the batch.

        Fewer are taken where the batch holds fewer, or where it ends. After the last of them come the buffered traces,
        all at once.
        """
        assert not self.is_used_up, "a batch that is used up has no minibatch"
        size = len(self.orders)
        if self.position >= self.passes * size:
            own = Minibatch(groups=self.buffered, finished=(), is_last=True)
            return own, replace(self, buffered_orders=(), buffered=())
        stop = min(self.position + min(num_prompts, size), self.passes * size)
        wanted = {self.orders[entry % size] for entry in range(self.position, stop)}
        after = replace(self, position=stop)
        taken = tuple(group for group in self.groups if order_of(group) in wanted)
        is_open = {order_of(group): after.passes_left(order_of(group)) > 0 for group in self.groups}
        minibatch = Minibatch(
            groups=taken,
            finished=tuple(group for group in taken if not is_open[order_of(group)]),
            is_last=after.is_used_up,
        )
        return minibatch, replace(after, groups=tuple(g for g in self.groups if is_open[order_of(g)]))

    def with_groups(self, groups: Iterable[Group]) -> RolloutBatch:
        """Return the batch with its groups replaced by ``groups``, which have the same orders."""
        return replace(self, groups=tuple(groups))

    def as_json(self) -> dict[str, Any]:
        """Return all but the groups, for a checkpoint; the same on every rank."""
        return {
            "orders": list(self.orders),
            "passes": self.passes,
            "position": self.position,
            "buffered_orders": list(self.buffered_orders),
        }

    @classmethod
    def from_json(
        cls, stored: Mapping[str, Any], groups: Sequence[Group] = (), buffered: Sequence[Group] = ()
    ) -> RolloutBatch:
        """Read what :meth:`as_json` wrote, with what of ``groups`` and ``buffered`` belongs to it; ignore the rest."""
        batch = cls(
            orders=tuple(int(order) for order in stored["orders"]),
            passes=int(stored["passes"]),
            position=int(stored["position"]),
            # A checkpoint of an earlier version has none.
            buffered_orders=tuple(int(order) for order in stored.get("buffered_orders", ())),
        )
        return replace(batch, groups=_of(batch.orders, groups), buffered=_of(batch.buffered_orders, buffered))


def _of(orders: Sequence[int], groups: Sequence[Group]) -> tuple[Group, ...]:
    own = set(orders)
    return tuple(sorted((group for group in groups if order_of(group) in own), key=order_of))
