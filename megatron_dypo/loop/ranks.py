"""The ranks of a run, and how they agree on small facts. They are a value that the loop gets, so tests can use
threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_dypo.parallel.collectives import any_rank, broadcast_object, gather_objects
from megatron_dypo.parallel.groups import MeshRank

T = TypeVar("T")


class Ranks(Protocol):
    """One rank among the others. A replica is a whole copy of the policy; its first rank is its leader."""

    @property
    def replica(self) -> int:
        """Return the number of this rank's replica, from 0."""

    @property
    def replicas(self) -> int:
        """Return the number of replicas."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""

    @property
    def is_global_leader(self) -> bool:
        """Return whether this is the leader of the first replica, which writes and logs for all."""

    def of_leaders(self, mine: T) -> list[T]:
        """Return ``mine`` of every leader, by replica, the same on every rank. Values of other ranks are ignored.

        Collective over the world; for a few numbers or words, not for tensors.
        """

    def any_rank(self, mine: bool) -> bool:
        """Return whether ``mine`` is true on any rank, leader or not. Collective over the world."""


def own_part(count: int, ranks: Ranks) -> int:
    """Return ``count`` divided by the number of replicas, rounded up."""
    return -(-count // ranks.replicas)


@dataclass(frozen=True, kw_only=True)
class MeshRanks:
    """:class:`Ranks` over the process groups of a mesh."""

    layout: MeshRank

    @property
    def replica(self) -> int:
        return self.layout.dp_rank

    @property
    def replicas(self) -> int:
        return self.layout.data

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def is_global_leader(self) -> bool:
        return self.layout.is_global_leader

    def of_leaders(self, mine: T) -> list[T]:
        leaders = self.layout.leaders_group
        found: list[T] = gather_objects(mine, leaders) if leaders is not None else []
        agreed: list[T] = broadcast_object(found, self.layout.replica_group)
        return agreed

    def any_rank(self, mine: bool) -> bool:
        return any_rank(mine)
