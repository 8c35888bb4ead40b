"""From the sharded parameters of one pipeline stage to whole HF tensors, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.hf.write import TensorSpec
from megatron_dypo.parallel.groups import MeshRank


@torch.no_grad()
def iter_hf_tensors(
    named_params: Iterable[tuple[str, Tensor]], arch: Architecture, layout: MeshRank
) -> Iterator[tuple[str, Tensor]]:
    """HF names and tensors of the given parameters: experts on expert-tensor rank 0, all else on tensor-parallel rank 0.

    Collective over ``tp_group`` and ``etp_group`` (where they have more than one rank): each rank must exhaust it, with
    the same experts as the other ranks of ``etp_group``, and the same of all else as those of ``tp_group``, in the same
    order. At most one parameter is whole at a time. A replicated parameter is yielded as it is, not copied. Copies of tied
    embeddings are left out.

    Raises:
        ValueError: a parameter that no rule matches.
    """
    for name, param in named_params:
        row = match(name, arch)
        if row.is_copy:
            continue
        rank, size, group = _axis(row, layout)
        if row.rule.tp_dim is None or size == 1:
            shards = [param.detach()]
        else:
            shards = _gather_to_first(param.detach(), rank, size, group)
        if rank == 0:
            yield from zip(row.hf, row.rule.merge(shards, arch), strict=True)


def sent_params(
    named_params: Iterable[tuple[str, Tensor]], arch: Architecture, layout: MeshRank
) -> list[tuple[str, Tensor]]:
    """Those of this rank's parameters that it has a part in when the policy leaves the mesh: all of it, once."""
    return [
        (name, param)
        for name, param in named_params
        if (layout.sends_experts if match(name, arch).is_expert else layout.sends_dense)
    ]


def written_specs(params: Iterable[tuple[str, Tensor]], arch: Architecture, layout: MeshRank) -> list[TensorSpec]:
    """The HF tensors that this rank gets from :func:`iter_hf_tensors` of its :func:`sent_params`, in that order."""
    return [
        TensorSpec(hf_name, param.dtype, shape)
        for name, param in params
        if not (row := match(name, arch)).is_copy and (layout.leads_experts if row.is_expert else layout.leads_stage)
        for hf_name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True)
    ]


def part_name(layout: MeshRank) -> str:
    """Stem of the files that this rank writes; sorts by stage."""
    stage = f"stage-{layout.pp_rank:05d}"
    return stage if layout.leads_stage else f"{stage}-experts-{layout.ep_rank:05d}"


def _axis(row: Row, layout: MeshRank) -> tuple[int, int, dist.ProcessGroup | None]:
    """Rank, size and group of the axis that may split a parameter."""
    return (*layout.shard(is_expert=row.is_expert), layout.etp_group if row.is_expert else layout.tp_group)


def _gather_to_first(shard: Tensor, tp_rank: int, tp_size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    # gloo sends the storage as it lies and ignores strides without a word
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(tp_size)] if tp_rank == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return shards or []
