"""The training mesh as a value: sizes, ranks and groups. The only reader of Megatron's ``parallel_state``."""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dypo.config.tree import ParallelConfig
from megatron_dypo.parallel import device


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this rank stands. A *replica* is a whole copy of the policy: all ranks with one ``dp_rank``."""

    rank: int
    world_size: int
    tensor: int
    """Sizes of the axes."""
    pipeline: int
    virtual_pipeline: int
    """Model chunks on each pipeline rank; 1: not interleaved."""
    context: int
    data: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    """Groups of device tensors."""
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """Data × context parallel ranks: those that hold the same parameters."""
    replica_group: dist.ProcessGroup
    """CPU (gloo) group of this replica's ranks; the first is its leader."""
    leaders_group: dist.ProcessGroup | None
    """CPU (gloo) group of the replicas' leaders, ordered by ``dp_rank``; None on a rank that leads nothing."""
    replica_ranks: tuple[int, ...]
    """Global ranks of this replica, ascending."""
    senders_group: dist.ProcessGroup | None = None
    """CPU (gloo) group of the ranks of which ``is_sender`` is true; None on the others."""
    first_stage_layers: int | None = None
    """Layers of the first and of the last stage of a pipeline that is cut unevenly, as in ``ParallelConfig``."""
    last_stage_layers: int | None = None
    expert: int = 1
    """Ranks that share out the experts of a layer: neighbours among the ranks of a stage, across replicas if need be."""
    ep_rank: int = 0
    expert_tensor: int = 1
    """Ranks that each of these experts is split over: the nearest neighbours, so that ``etp_rank`` runs faster than
    ``ep_rank``, and that faster than ``expert_replica``."""
    etp_rank: int = 0
    etp_group: dist.ProcessGroup | None = None
    """Group of device tensors; None where experts are whole."""
    expert_replica: int = 0
    """Number of the whole set of experts, within this stage, that this rank holds a part of."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pipeline - 1

    @property
    def sends_dense(self) -> bool:
        """Whether this rank's shards of all but the experts leave the mesh (exports, pushes): the first replica's do."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def leads_stage(self) -> bool:
        """Whether this rank makes its stage's shards whole for that."""
        return self.sends_dense and self.tp_rank == 0

    @property
    def sends_experts(self) -> bool:
        """Whether this rank's shards of experts leave the mesh: those of the first set do."""
        return self.expert_replica == 0

    @property
    def leads_experts(self) -> bool:
        """Whether this rank makes its experts whole for that, and they leave from here."""
        return self.sends_experts and self.etp_rank == 0

    @property
    def shares_experts(self) -> bool:
        """Whether a rank computes with other ranks' experts, of other replicas it may be, and so has to wait for them."""
        return self.expert * self.expert_tensor > 1

    @property
    def is_sender(self) -> bool:
        return self.sends_dense or self.sends_experts

    @property
    def leader_rank(self) -> int:
        """Global rank of this replica's leader."""
        return self.replica_ranks[0]

    @property
    def scoring_ranks(self) -> tuple[int, ...]:
        """Global ranks of this replica's last pipeline stage with tensor-parallel rank 0, by ``cp_rank``."""
        return self.replica_ranks[-self.tensor * self.context :: self.tensor]

    @property
    def is_replica_leader(self) -> bool:
        return self.rank == self.leader_rank

    @property
    def is_global_leader(self) -> bool:
        return self.rank == 0


def replica_ranks(*, tensor: int, context: int, pipeline: int, data: int, dp_rank: int) -> tuple[int, ...]:
    """Global ranks of one replica, ascending, in Megatron's order tensor, context, data, pipeline (fastest first)."""
    inner = tensor * context
    return tuple(
        pp_rank * data * inner + dp_rank * inner + offset for pp_rank in range(pipeline) for offset in range(inner)
    )


def sender_ranks(*, tensor: int, context: int, pipeline: int, data: int, expert_ranks: int) -> tuple[int, ...]:
    """Global ranks that hold the policy once: of each stage the first tensor group and the first ``expert_ranks`` ranks."""
    stage = tensor * context * data
    return tuple(pp_rank * stage + offset for pp_rank in range(pipeline) for offset in range(max(tensor, expert_ranks)))


def init_layout(config: ParallelConfig, *, timeout_s: float = 1800.0, seed: int = 1) -> Layout:
    """Join the process group, set Megatron's model-parallel groups and RNG seeds up, and describe the result.

    On a CPU this also installs :mod:`megatron_dypo.mcore.cpu`. Reads ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT`` and ``LOCAL_RANK`` as torchrun sets them; without ``RANK`` the world is this process.

    Raises:
        ValueError: the world is no multiple of tensor × pipeline × context, or a stage's ranks none of expert ×
            expert_tensor; or an unsupported version on a CPU.
    """
    from megatron_dypo.mcore import cpu, features

    features.shield_imports()
    if not device.on_gpu():
        cpu.install()
    device.bind()
    timeout = datetime.timedelta(seconds=timeout_s)
    device.init_process_group(timeout)
    _check_world(config, dist.get_world_size())
    _init_megatron(config, timeout, seed)
    return _describe(config, timeout)


def close(layout: Layout) -> None:
    """Leave all groups. Collective: every rank calls it, after its last collective.

    Called while an exception unwinds, it does nothing: peers may be in any collective, so that waiting for them would
    hide the error for as long as the timeout; they are freed when this process ends and its sockets close.
    """
    from megatron.core import parallel_state

    if sys.exc_info()[0] is not None:
        return
    dist.barrier(group=layout.replica_group)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _check_world(config: ParallelConfig, world_size: int) -> None:
    model_size = config.tensor * config.pipeline * config.context
    if world_size % model_size:
        dist.destroy_process_group()
        raise ValueError(
            f"world_size={world_size}: must be a multiple of tensor × pipeline × context = "
            f"{config.tensor} × {config.pipeline} × {config.context} = {model_size}"
        )
    stage = world_size // config.pipeline
    if stage % config.expert_ranks:
        dist.destroy_process_group()
        raise ValueError(
            f"parallel.expert × expert_tensor = {config.expert} × {config.expert_tensor} does not divide "
            f"the {stage} ranks of a pipeline stage"
        )


def _init_megatron(config: ParallelConfig, timeout: datetime.timedelta, seed: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    # Pipeline stages draw from different streams, as in Megatron's own training loop.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def _describe(config: ParallelConfig, timeout: datetime.timedelta) -> Layout:
    from megatron.core import parallel_state

    data = parallel_state.get_data_parallel_world_size()
    dp_rank = parallel_state.get_data_parallel_rank()
    replicas = [
        replica_ranks(
            tensor=config.tensor, context=config.context, pipeline=config.pipeline, data=data, dp_rank=dp_rank_
        )
        for dp_rank_ in range(data)
    ]
    assert dist.get_rank() in replicas[dp_rank], "Megatron's rank order changed"
    # new_group is collective over the world: every rank makes every group, in the same order.
    replica_groups = [dist.new_group(list(ranks), backend="gloo", timeout=timeout) for ranks in replicas]
    leaders = [ranks[0] for ranks in replicas]
    leaders_group = dist.new_group(leaders, backend="gloo", timeout=timeout)
    senders = sender_ranks(
        tensor=config.tensor,
        context=config.context,
        pipeline=config.pipeline,
        data=data,
        expert_ranks=config.expert_ranks,
    )
    senders_group = dist.new_group(list(senders), backend="gloo", timeout=timeout)
    layout = Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=config.tensor,
        pipeline=config.pipeline,
        virtual_pipeline=config.virtual_pipeline or 1,
        context=config.context,
        data=data,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=dp_rank,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replica_group=replica_groups[dp_rank],
        leaders_group=leaders_group if dist.get_rank() in leaders else None,
        replica_ranks=replicas[dp_rank],
        senders_group=senders_group if dist.get_rank() in senders else None,
        first_stage_layers=config.first_stage_layers,
        last_stage_layers=config.last_stage_layers,
        expert=config.expert,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_tensor=config.expert_tensor,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_group=parallel_state.get_expert_tensor_parallel_group() if config.expert_tensor > 1 else None,
        expert_replica=parallel_state.get_expert_data_parallel_rank(),
    )
    assert layout.is_sender == (layout.rank in senders), "Megatron's rank order changed"
    return layout
