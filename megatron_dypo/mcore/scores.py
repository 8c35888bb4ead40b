"""Scores of single trajectories, ∇_θ Σ_t log π_θ(a_t), each kept as a projection to a short vector.

The gradients of GRPO, GAL and SFT at θ = θ_old are sums of scores with one coefficient for each trajectory, so scores
are enough to compare them (:mod:`megatron_dypo.probe`). One trajectory is one microbatch: under pipeline parallelism
the stages wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dypo.mcore.chunks import main_grad, named_global_parameters, unwrap
from megatron_dypo.mcore.forward_step import score_pass
from megatron_dypo.mcore.logprobs import pack_alone
from megatron_dypo.mcore.moe_router import leave_out_balance
from megatron_dypo.mcore.reduction import local_gradients, zero_gradients
from megatron_dypo.mcore.routing_replay import RoutingReplay
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.gradient_projection import GradientMap, ShardProjector
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Floats, Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceScore:
    """The score of one trajectory."""

    score_d: Floats
    """[d] Projection of ∇_θ Σ_t log π_θ(a_t)."""
    logp: float
    """Σ_t log π_θ(a_t), which the forward pass of the score has anyway."""


def sequence_scores(
    chunks: Sequence[torch.nn.Module],
    samples: Sequence[Sample],
    gradient_map: GradientMap,
    *,
    arch: Architecture,
    layout: MeshRank,
    token_multiple: int = 1,
    bar: Progress | None = None,
    replay: RoutingReplay | None = None,
) -> Iterator[SequenceScore]:
    """Yield the score of each sample, in order. Collective over the replica.

    Every rank of the replica passes the same samples; the leader gets the scores, the other ranks get zeros. If
    replicas share experts, the tokens of one meet those of another in them, so all replicas must pass the same samples
    at the same time, and the function is collective over the world. Each rank must exhaust the iterator. The gradients
    in DDP's buffers are lost.
    """
    projector, held = ShardProjector(gradient_map, arch), _counted(chunks, arch, layout)
    with local_gradients(chunks), leave_out_balance(chunks):
        for sample in samples:
            zero_gradients(chunks)
            parts = pack_alone([sample], layout, token_multiple=token_multiple, streams=(), replay=replay)
            logp = score_pass(chunks, parts).cpu() * (layout.tp_rank == 0)  # all tensor-parallel ranks have it
            whole = _summed(torch.cat([_projected(held, projector), logp[None]]), layout)
            if bar is not None:
                bar.update(1)
            yield SequenceScore(score_d=whole[:-1].to(torch.float32).numpy(), logp=float(whole[-1]))
    zero_gradients(chunks)


def _summed(part_d: torch.Tensor, layout: MeshRank) -> torch.Tensor:
    """Return the sum over the ranks that worked on one trajectory, on the leader; zeros elsewhere."""
    dist.reduce(part_d, layout.leader_rank, group=layout.replica_group)
    if layout.leaders_group is None:
        return torch.zeros_like(part_d)
    if layout.mesh.replicas_share_experts:
        dist.all_reduce(part_d, group=layout.leaders_group)
        part_d /= layout.data
    return part_d


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    """A parameter whose gradient this rank projects, and this rank's place on the axis that may split it."""

    parameter: torch.nn.Parameter
    row: Row
    rank: int
    size: int


def _counted(chunks: Sequence[torch.nn.Module], arch: Architecture, layout: MeshRank) -> list[_Held]:
    """List the parameters of this rank whose gradients add to the sum over ranks."""
    found = []
    for name, parameter in named_global_parameters(chunks):
        row = match(name, arch)
        rank, size = (layout.etp_rank, layout.expert_tensor) if row.is_expert else (layout.tp_rank, layout.tensor)
        if _is_counted(name, parameter, row, chunks, layout):
            found.append(_Held(parameter=parameter, row=row, rank=rank, size=size))
    return found


def _projected(held: Sequence[_Held], projector: ShardProjector) -> torch.Tensor:
    """Return this rank's part of the projection, [d] float64 on the CPU."""
    total_D = torch.zeros(2 * projector.size, dtype=torch.float64, device=device())
    for one in held:
        projector.add(total_D, main_grad(one.parameter), one.row, one.rank, one.size)
    return projector.signed(total_D).cpu()


def _is_counted(
    name: str, parameter: torch.nn.Parameter, row: Row, chunks: Sequence[torch.nn.Module], layout: MeshRank
) -> bool:
    """Say whether this rank's gradient adds to the sum over tensor-parallel ranks.

    A shard does. A replicated parameter whose gradient is whole on every rank counts on the first one only. Some
    replicated parameters see only a part of the tokens or heads on each rank; Megatron sums them over the ranks
    (distributed/finalize_model_grads.py:318-360 of 0.16.1), and so does this sum.
    """
    if row.is_expert or row.rule.tp_dim is not None or layout.tp_rank == 0:
        return True
    config = unwrap(chunks[0]).config
    is_cut_by_tokens = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    return is_cut_by_tokens or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
