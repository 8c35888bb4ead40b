"""Queues in which graded groups wait for a rollout batch, one for each treatment. Each replica has its own queues.

A :class:`megatron_dypo.batching.rollout_batch.RolloutBatch` takes the oldest groups over all replicas.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_dypo.types import Sample, Treatment

Group: TypeAlias = "list[Sample]"
"""The samples of one draw of a prompt, which share ``Sample.order`` and ``Sample.treatment``."""


@dataclass(kw_only=True)
class Queues:
    """The waiting groups of one replica, by treatment."""

    waiting: dict[Treatment, list[Group]] = field(
        default_factory=lambda: {treatment: [] for treatment in Treatment if treatment is not Treatment.DROP}
    )

    buffer: list[Group] = field(default_factory=list)
    """Traces that wait for an update of their own, oldest first; they are no draws, and count in no queue."""

    def put(self, group: Group) -> None:
        """Add a group to the queue of its treatment, or a buffered trace to the buffer."""
        (self.buffer if group[0].is_buffered else self.waiting[group[0].treatment]).append(group)

    def take_buffered(self, orders: Collection[int], keeps: int) -> list[Group]:
        """Remove and return the buffered traces of these orders, oldest first; keep the newest ``keeps`` others."""
        wanted = set(orders)
        taken = [group for group in sorted(self.buffer, key=order_of) if order_of(group) in wanted]
        others = [group for group in sorted(self.buffer, key=order_of) if order_of(group) not in wanted]
        self.buffer = others[max(len(others) - keeps, 0) :]
        return taken

    def groups(self) -> list[Group]:
        """Return all groups, oldest first."""
        return sorted((g for queue in self.waiting.values() for g in queue), key=order_of)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def orders(self) -> list[int]:
        """Return the orders of all groups, ascending."""
        return sorted(order_of(group) for queue in self.waiting.values() for group in queue)

    def take(self, orders: Collection[int]) -> list[Group]:
        """Remove and return the groups with these orders, oldest first; ignore orders that another replica holds."""
        wanted = set(orders)
        taken = [group for group in self.groups() if order_of(group) in wanted]
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [group for group in queue if order_of(group) not in wanted]
        return taken

    def replace(self, groups: Iterable[Group]) -> None:
        """Replace the groups that have the same orders as ``groups``."""
        by_order = {order_of(group): group for group in groups}
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [by_order.get(order_of(group), group) for group in queue]

    def drop_stale(self, version: int, max_version_lag: int) -> int:
        """Drop groups that weights of more than ``max_version_lag`` versions ago sampled; return how many."""
        before = len(self)
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if version - g[0].policy_version <= max_version_lag]
        return before - len(self)


def order_of(group: Group) -> int:
    """Return the position of a group's draw in the run; it defines the group's age."""
    return group[0].order


def newest(orders_by_replica: Iterable[Iterable[int]], count: int) -> list[int]:
    """Return the ``count`` highest orders over all replicas, ascending; [] where there are fewer."""
    orders = sorted(order for orders in orders_by_replica for order in orders)
    return orders[-count:] if len(orders) >= count else []


def oldest(orders_by_replica: Iterable[Iterable[int]], count: int) -> list[int]:
    """Return the ``count`` lowest orders over all replicas, ascending: first in, first out, for all treatments."""
    return sorted(order for orders in orders_by_replica for order in orders)[:count]
