"""Where graded groups wait for an update: one queue a treatment, oldest first, each replica its own part.

A rollout batch is opened from the oldest of what waits; its mini-batches are drawn from it until nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_dypo.types import Sample, Treatment


@dataclass(kw_only=True)
class Queues:
    """Groups by treatment; a group is the list of samples that share ``Sample.order``."""

    waiting: dict[Treatment, list[list[Sample]]] = field(
        default_factory=lambda: {Treatment.DISTILL: [], Treatment.REINFORCE: []}
    )
    batch: list[list[Sample]] = field(default_factory=list)
    """The groups of the rollout batch that updates are being made from; a group leaves with its last update."""

    def put(self, group: list[Sample]) -> None:
        """Where ``updates_left`` says that the group belongs."""
        (self.batch if group[0].updates_left else self.waiting[group[0].treatment]).append(group)

    def groups(self) -> list[list[Sample]]:
        """All groups that wait, oldest first."""
        return sorted((g for queue in self.waiting.values() for g in queue), key=lambda g: g[0].order)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def drop_stale(self, version: int, max_staleness: int) -> int:
        """Drop groups that weights of more than ``max_staleness`` versions ago produced; returns how many."""
        before = len(self)
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if version - g[0].policy_version <= max_staleness]
        return before - len(self)

    def unscored(self) -> list[Sample]:
        """Samples for RL that have no log-probs under π_old yet, oldest first: of the batch, and of what waits."""
        groups = [*self.batch, *self.groups()]
        found = [s for g in groups for s in g if s.treatment is Treatment.REINFORCE and s.old_logp is None]
        return sorted(found, key=lambda sample: sample.order)

    def not_scored_by(self, version: int) -> list[Sample]:
        """Samples for RL of the batch whose log-probs under π_old are not those of this version's weights."""
        return [s for g in self.batch for s in g if s.treatment is Treatment.REINFORCE and s.scored_version != version]

    def open_batch(self, orders: Iterable[int], *, epochs: int) -> None:
        """Move the groups with these orders into the batch, for ``epochs`` updates each; orders of others are ignored."""
        wanted = set(orders)
        for group in self.groups():
            if group[0].order in wanted:
                for sample in group:
                    sample.updates_left = epochs
                self.batch.append(group)
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if g[0].order not in wanted]

    def turns(self) -> list[tuple[int, int]]:
        """(−updates left, order) of each group of the batch: they are drawn in this order, a pass after the other."""
        return sorted((-g[0].updates_left, g[0].order) for g in self.batch)

    def draw(self, turns: Iterable[tuple[int, int]]) -> list[list[Sample]]:
        """The batch's groups with these orders, oldest first, for one update; orders of others are ignored."""
        wanted = {order for _, order in turns}
        drawn = sorted((g for g in self.batch if g[0].order in wanted), key=lambda g: g[0].order)
        for sample in (s for g in drawn for s in g):
            sample.updates_left -= 1
        self.batch = [g for g in self.batch if g[0].updates_left]
        return drawn


Key = TypeVar("Key", int, tuple[int, int])


def oldest(keys_by_replica: Sequence[Sequence[Key]], count: int) -> list[Key]:
    """The ``count`` first keys over all replicas: with orders, first in, first out, whatever the regime."""
    return sorted(key for keys in keys_by_replica for key in keys)[:count]


def is_used_up(left_by_replica: Iterable[int]) -> bool:
    """Whether a rollout batch has no group left on any replica, given how many each has: replicas run out one by one."""
    return not any(left_by_replica)
