"""From the sharded parameters of one pipeline stage to whole HF tensors, one parameter at a time.

Before each gather, the ranks of the group agree that none of them has failed. So an error on one rank ends the
iteration on all of them at once; otherwise the others would wait for the time-out of their group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows, match
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.hf.write import TensorSpec, stored_specs
from megatron_dypo.models.stacked_experts import stored_tensors
from megatron_dypo.parallel import device
from megatron_dypo.parallel.groups import MeshRank


class PeerFailedError(RuntimeError):
    """Another rank of the same gathers failed; the error of that rank says why."""


@torch.no_grad()
def iter_hf_tensors(
    params: Sequence[tuple[str, Tensor]],
    arch: Architecture,
    layout: MeshRank,
    values: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an HF folder: :func:`iter_table_tensors`, with experts stacked where the folder stacks them.

    A stack is whole on the stage's leader, in memory once. All ranks that own experts of the stage take part.
    """
    with contextlib.closing(iter_table_tensors(params, arch, layout, values)) as tensors:
        yield from stored_tensors(tensors, arch)


@torch.no_grad()
def iter_table_tensors(
    params: Sequence[tuple[str, Tensor]],
    arch: Architecture,
    layout: MeshRank,
    values: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Generator[tuple[str, Tensor], None, None]:
    """Yield HF names of the name table and tensors of parameters: experts on expert-tensor rank 0, all others on
    tensor-parallel rank 0.

    Collective over ``tp_group`` and ``etp_group`` (if they have more than one rank). Stacked experts are yielded by the
    first owner alone, and are gathered over ``ep_group``. Each rank must exhaust or close the iterator. All ranks
    of ``etp_group`` need the same experts, and all ranks of ``tp_group`` the same other parameters, in the same order.
    At most one parameter is whole at a time. A replicated parameter is yielded without a copy. Copies of tied
    embeddings are left out.

    Args:
        values: returns a parameter, or a dequantised copy of one in FP8; called for one parameter at a time.

    Raises:
        ValueError: no rule matches a parameter.
        PeerFailedError: another rank failed, or closed the iterator before its end.
    """
    peers = _Peers(params, arch, layout)
    try:
        for name, param in params:
            row = match(name, arch)
            if row.is_copy:
                continue
            axis = _axis(row, arch, layout)
            value = values(param).detach()
            shards = _gather_to_first(value, axis, peers) if _is_split(row, axis) else [value]
            del value
            if axis.rank == 0:
                yield from _merged(row, shards, arch, layout)
    except BaseException:  # also GeneratorExit: the caller failed or has stopped early
        with contextlib.suppress(RuntimeError):  # the group itself is broken; the first error says more
            peers.leave(failed=True)
        raise
    peers.leave(failed=False)


@contextlib.contextmanager
def exhausted(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Exhaust the iterator at the end of the block, also after an error, since other ranks still wait in gathers."""
    try:
        yield tensors
    except BaseException:
        with contextlib.suppress(PeerFailedError):  # the first error says more
            for _ in tensors:
                pass
        raise
    for _ in tensors:
        pass


def sent_params(
    named_params: Iterable[tuple[str, Tensor]], arch: Architecture, layout: MeshRank
) -> list[tuple[str, Tensor]]:
    """Return the parameters that this rank sends, or helps to gather, when the policy is exported or sent."""
    return [
        (name, param)
        for name, param in named_params
        if (layout.sends_experts if match(name, arch).is_expert else layout.sends_dense)
    ]


def in_table_order(params: list[tuple[str, Tensor]], arch: Architecture) -> list[tuple[str, Tensor]]:
    """Sort parameters as the family's table lists them, so that files are cut as the converters cut them, and at most
    one stack of experts is whole at a time."""
    place = {row.mcore: number for number, row in enumerate(family_rows(arch))}
    return sorted(params, key=lambda named: place[match(named[0], arch).mcore])


def written_specs(params: Iterable[tuple[str, Tensor]], arch: Architecture, layout: MeshRank) -> list[TensorSpec]:
    """List the HF tensors that :func:`iter_hf_tensors` yields here for this rank's :func:`sent_params`, in order."""
    specs = [
        TensorSpec(hf_name, param.dtype, shape)
        for name, param in params
        if not (row := match(name, arch)).is_copy and _leads(row, arch, layout)
        for each in (_of_owners(row, arch, layout) if _is_gathered(row, arch) else (row,))
        for hf_name, shape in zip(each.hf, each.rule.hf_shapes(arch), strict=True)
    ]
    return stored_specs(specs, arch)


def part_name(layout: MeshRank) -> str:
    """Return the stem of the files that this rank writes. Stems sort by stage."""
    stage = f"stage-{layout.pp_rank:05d}"
    return stage if layout.leads_stage else f"{stage}-experts-{layout.ep_rank:05d}"


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The axis that may split a parameter, from this rank's view."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    is_of_owners: bool = False
    """Whether each rank has another expert, rather than a part of the same one."""


class _Peers:
    """The groups in which this rank gathers ``params``. No rank starts a gather that another one cannot join."""

    def __init__(self, params: Sequence[tuple[str, Tensor]], arch: Architecture, layout: MeshRank) -> None:
        self._groups: list[dist.ProcessGroup | None] = []
        for name, _ in params:
            with contextlib.suppress(ValueError):  # no rule matches: the iteration raises this and tells the groups
                row = match(name, arch)
                axis = _axis(row, arch, layout)
                if not row.is_copy and _is_split(row, axis) and axis.group not in self._groups:
                    self._groups.append(axis.group)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Wait until all ranks of ``group`` are at the same gather.

        Raises:
            PeerFailedError: one of them has failed.
        """
        if _any_failed([group], False):
            self._groups.remove(group)  # all its ranks know
            raise PeerFailedError("another rank failed while weights were gathered")

    def leave(self, *, failed: bool) -> None:
        """Tell all groups whether this rank has failed. No call may follow.

        Raises:
            PeerFailedError: another rank has failed, and this one has not.
        """
        if _any_failed(self._groups, failed) and not failed:
            raise PeerFailedError("another rank failed while weights were gathered")


def _any_failed(groups: Sequence[dist.ProcessGroup | None], failed: bool) -> bool:
    """Return whether any rank of the groups has failed. Ranks may come to the groups in different orders."""
    flags = [torch.tensor([float(failed)], device=device.device()) for _ in groups]
    works = [
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group, async_op=True)
        for flag, group in zip(flags, groups, strict=True)
    ]
    for work in works:
        work.wait()
    return any(bool(flag.item()) for flag in flags)


def _is_split(row: Row, axis: _Axis) -> bool:
    return axis.size > 1 and (row.rule.tp_dim is not None or axis.is_of_owners)


def _is_gathered(row: Row, arch: Architecture) -> bool:
    """Return whether the stage's leader gathers a parameter from the ranks that own experts, to stack them."""
    return row.is_expert and arch.experts is not None and arch.experts.is_stacked


def _merged(row: Row, shards: list[Tensor], arch: Architecture, layout: MeshRank) -> Iterator[tuple[str, Tensor]]:
    """Yield the HF tensors of one parameter's shards, or of the parameters of all owners of experts."""
    if not _is_gathered(row, arch):
        yield from zip(row.hf, row.rule.merge(shards, arch), strict=True)
        return
    for owned, shard in zip(_of_owners(row, arch, layout), shards, strict=True):
        yield from zip(owned.hf, owned.rule.merge([shard], arch), strict=True)


def _leads(row: Row, arch: Architecture, layout: MeshRank) -> bool:
    return layout.leads_experts if row.is_expert and not _is_gathered(row, arch) else layout.leads_stage


def _of_owners(row: Row, arch: Architecture, layout: MeshRank) -> Iterator[Row]:
    """Yield the rows of the experts that the owners hold in the place where the first owner holds that of ``row``."""
    assert arch.experts is not None
    count = arch.experts.num_experts // layout.expert
    head, experts, tail = row.mcore.partition(".local_experts.")
    first, _, inside = tail.partition(".")
    for owner in range(layout.expert):
        yield match(f"{head}{experts}{int(first) % count + owner * count}.{inside}", arch)


def _axis(row: Row, arch: Architecture, layout: MeshRank) -> _Axis:
    if _is_gathered(row, arch):
        return _Axis(rank=layout.ep_rank, size=layout.expert, group=layout.ep_group, is_of_owners=True)
    if row.is_expert:
        return _Axis(rank=layout.etp_rank, size=layout.expert_tensor, group=layout.etp_group)
    return _Axis(rank=layout.tp_rank, size=layout.tensor, group=layout.tp_group)


def _gather_to_first(shard: Tensor, axis: _Axis, peers: _Peers) -> list[Tensor]:
    """Return the shards of all ranks on the first rank of the axis, nothing on the others."""
    # gloo sends the storage and silently ignores strides
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(axis.size)] if axis.rank == 0 else None
    peers.agree(axis.group)  # after everything that may fail on a single rank
    dist.gather(shard, shards, group=axis.group, group_dst=0)
    return shards or []
