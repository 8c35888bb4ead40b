"""The position of one rank in the mesh. Pure, without torch or Megatron; :mod:`.mesh` defines the order of the axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dypo.checks import require

if TYPE_CHECKING:
    from megatron_dypo.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Position:
    """The position of one rank in the mesh: its coordinates, and its roles in its replica and in the mesh."""

    mesh: Mesh
    rank: int
    """Global rank."""

    def __post_init__(self) -> None:
        last = self.mesh.world_size - 1
        require(0 <= self.rank <= last, f"rank={self.rank}", f"must be from 0 to {last}")

    @property
    def _in_stage(self) -> int:
        """Return the number of this rank among those of its stage."""
        return self.rank % self.mesh.stage_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.mesh.tensor

    @property
    def cp_rank(self) -> int:
        return self._in_stage // self.mesh.tensor % self.mesh.context

    @property
    def dp_rank(self) -> int:
        """Return the number of this rank's replica."""
        return self._in_stage // (self.mesh.tensor * self.mesh.context)

    @property
    def pp_rank(self) -> int:
        """Return the number of this rank's pipeline stage."""
        return self.rank // self.mesh.stage_size

    @property
    def etp_rank(self) -> int:
        """Return the number of the part that this rank holds of each of its experts."""
        return self._in_stage % self.mesh.expert_tensor

    @property
    def ep_rank(self) -> int:
        """Return this rank's number along the expert axis, which determines the experts that it holds."""
        return self._in_stage // self.mesh.expert_tensor % self.mesh.expert

    @property
    def expert_replica(self) -> int:
        """Return the number of the copy of all experts, within this stage, that this rank holds a part of."""
        return self._in_stage // self.mesh.expert_ranks

    def shard(self, *, is_expert: bool) -> tuple[int, int]:
        """Return (number of the shard that this rank holds, number of shards) of a parameter that is split."""
        return (self.etp_rank, self.mesh.expert_tensor) if is_expert else (self.tp_rank, self.mesh.tensor)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.mesh.pipeline - 1

    @property
    def sends_dense(self) -> bool:
        """Tell whether exports and refits send this rank's shards of all parameters but experts: those of replica 0."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def leads_stage(self) -> bool:
        """Tell whether this rank gathers its stage's shards into whole tensors and sends them."""
        return self.sends_dense and self.tp_rank == 0

    @property
    def sends_experts(self) -> bool:
        """Tell whether exports and refits send this rank's shards of experts: those of the first copy."""
        return self.expert_replica == 0

    @property
    def leads_experts(self) -> bool:
        """Tell whether this rank gathers its experts into whole tensors and sends them."""
        return self.sends_experts and self.etp_rank == 0

    @property
    def is_sender(self) -> bool:
        """Tell whether exports and refits send any shard of this rank."""
        return self.sends_dense or self.sends_experts

    @property
    def shares_experts(self) -> bool:
        """Tell whether this rank uses experts of other ranks, possibly of other replicas, and so waits for them."""
        return self.mesh.expert_ranks > 1

    @property
    def replica_ranks(self) -> tuple[int, ...]:
        """Return the global ranks of this replica, ascending."""
        return self.mesh.replica_ranks(self.dp_rank)

    @property
    def leader_rank(self) -> int:
        """Return the global rank of this replica's leader."""
        return self.replica_ranks[0]

    @property
    def scoring_ranks(self) -> tuple[int, ...]:
        """Return the global ranks in this replica's last pipeline stage whose ``tp_rank`` is 0, by ``cp_rank``."""
        return self.replica_ranks[-self.mesh.tensor * self.mesh.context :: self.mesh.tensor]

    @property
    def is_replica_leader(self) -> bool:
        return self.rank == self.leader_rank

    @property
    def is_global_leader(self) -> bool:
        return self.rank == 0
