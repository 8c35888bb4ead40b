"""This rank's process groups and its place in the mesh. No other file reads Megatron's ``parallel_state``."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dypo.parallel import device
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.parallel.position import Position


@dataclass(frozen=True, kw_only=True)
class MeshRank(Position):
    """This rank: its place in the mesh (:class:`Position`) and the process groups that it belongs to."""

    tp_group: dist.ProcessGroup
    """Group for device tensors, like the next ones."""
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """Data × context parallel ranks: those that hold the same parameters."""
    etp_group: dist.ProcessGroup | None = None
    """Ranks that split an expert; None if experts are whole."""
    ep_group: dist.ProcessGroup | None = None
    """Ranks that share out the experts; None if each rank has all."""
    replica_group: dist.ProcessGroup
    """CPU (gloo) group of this replica's ranks; the first is its leader."""
    leaders_group: dist.ProcessGroup | None
    """CPU (gloo) group of the replicas' leaders, ordered by ``dp_rank``; None on a rank that leads no replica."""
    senders_group: dist.ProcessGroup | None = None
    """CPU (gloo) group of the ranks with ``is_sender``; None on the others."""

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    @property
    def tensor(self) -> int:
        return self.mesh.tensor

    @property
    def pipeline(self) -> int:
        return self.mesh.pipeline

    @property
    def virtual_pipeline(self) -> int:
        return self.mesh.virtual_pipeline

    @property
    def context(self) -> int:
        return self.mesh.context

    @property
    def data(self) -> int:
        return self.mesh.data

    @property
    def expert(self) -> int:
        return self.mesh.expert

    @property
    def expert_tensor(self) -> int:
        return self.mesh.expert_tensor


def join(mesh: Mesh, timeout: datetime.timedelta) -> MeshRank:
    """Join the world and make all groups of the mesh, those of Megatron and of this package. Collective over the world.

    It imports Megatron, which must be prepared before: :func:`megatron_dypo.mcore.start.start_megatron` does both.
    """
    from megatron.core import parallel_state

    device.init_process_group(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual_pipeline if mesh.virtual_pipeline > 1 else None,
        context_parallel_size=mesh.context,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=mesh.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    at = mesh.at(dist.get_rank())
    _check_rank_order(at)
    # new_group is collective over the world: every rank makes every group, in the same order.
    replicas = [mesh.replica_ranks(dp_rank) for dp_rank in range(mesh.data)]
    replica_groups = [_cpu_group(ranks, timeout) for ranks in replicas]
    leaders_group = _cpu_group([ranks[0] for ranks in replicas], timeout)
    senders_group = _cpu_group(mesh.sender_ranks(), timeout)
    return MeshRank(
        mesh=mesh,
        rank=at.rank,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        etp_group=parallel_state.get_expert_tensor_parallel_group() if mesh.expert_tensor > 1 else None,
        ep_group=parallel_state.get_expert_model_parallel_group() if mesh.expert > 1 else None,
        replica_group=replica_groups[at.dp_rank],
        leaders_group=leaders_group if at.is_replica_leader else None,
        senders_group=senders_group if at.is_sender else None,
    )


def wait_for_all(layout: MeshRank) -> None:
    """Return once every rank has called this. Collective over the world, on the CPU's groups."""
    dist.barrier(group=layout.replica_group)
    if layout.leaders_group is not None:
        dist.barrier(group=layout.leaders_group)
    dist.barrier(group=layout.replica_group)


def close(layout: MeshRank) -> None:
    """Leave all groups. Collective: every rank calls it after its last collective.

    While an exception unwinds it does nothing: peers may be in any collective, and waiting for them would hide the
    error until the timeout. They are freed when this process ends and its sockets close.
    """
    from megatron.core import parallel_state

    if sys.exc_info()[0] is not None:
        return
    # gloo lets a rank go while its peers still make connections.
    wait_for_all(layout)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _cpu_group(ranks: Sequence[int], timeout: datetime.timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
    return group


def _check_rank_order(at: Position) -> None:
    """Compare the mesh's numbering of ranks with Megatron's, which determines what each rank computes."""
    from megatron.core import parallel_state

    megatrons = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_data_parallel_rank(),
    )
    ours = (at.tp_rank, at.cp_rank, at.dp_rank, at.pp_rank, at.etp_rank, at.ep_rank, at.expert_replica)
    assert ours == megatrons, "Megatron's rank order changed"
