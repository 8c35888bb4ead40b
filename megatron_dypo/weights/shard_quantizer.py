"""FP8 slices of the parameters that a rank holds, equal to those of the whole tensors quantised offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.families.registry import match
from megatron_dypo.weights.quantize import block_amax, quantize_slice, scales_of, touched_blocks
from megatron_dypo.weights.quantized_names import (
    Quantization,
    block_shape,
    is_quantized,
    scale_shape,
    weight_name,
)


class SourceSlice(Protocol):
    """What is asked of a transfer of the refit plan.

    With ``part="scale"`` the HF tensor is that of the scales, and all coordinates count blocks.
    """

    @property
    def source_name(self) -> str: ...
    @property
    def source_row(self) -> int: ...
    @property
    def source_col(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def hf_name(self) -> str: ...
    @property
    def hf_row(self) -> int: ...
    @property
    def hf_col(self) -> int: ...
    @property
    def part(self) -> Literal["value", "scale"]: ...


class ShardQuantizer:
    """Serves slices of one rank's parameters during one push; parameters must not change while it is in use.

    Making it is collective over ``tp_group`` (unused when ``tp_size`` is 1): each rank's part of a block's amax meets
    those of the others in one all-reduce over all tensors that tensor parallelism splits. Held beside the parameters:
    one fp32 number for each block of the tensors that this rank has a part of, and the slice that was asked for.

    Raises:
        ValueError: a parameter that no rule matches.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        arch: Architecture,
        tp_rank: int,
        tp_size: int,
        tp_group: dist.ProcessGroup | None,
        quantization: Quantization,
    ) -> None:
        self._params = {match(name, arch).mcore: param.detach() for name, param in named_params}
        self._quantization = quantization
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._amax: dict[str, Tensor] = {}
        dense = [name for name in self._params if not match(name, arch).is_expert]
        buffer = self._allocate(dense, arch)
        # Experts are whole on the rank that owns them, and other members of the group own others.
        self._allocate([name for name in self._params if match(name, arch).is_expert], arch)
        for name in self._params:
            self._fill(name, arch, tp_rank, tp_size)
        if tp_size > 1:
            dist.all_reduce(buffer, dist.ReduceOp.MAX, group=tp_group)

    def slice(self, transfer: SourceSlice) -> Tensor:
        """What the transfer sends, contiguous: e4m3 values or fp32 scales; of a tensor that stays as it is, its values."""
        if transfer.part == "scale":
            amax = self._amax[weight_name(transfer.hf_name)]
            rows = slice(transfer.hf_row, transfer.hf_row + transfer.rows)
            return scales_of(amax[rows, transfer.hf_col : transfer.hf_col + transfer.cols])
        if not is_quantized(transfer.hf_name):
            return self._source(transfer).contiguous()
        amax = self._amax[transfer.hf_name]
        block = block_shape(self._quantization, self._shapes[transfer.hf_name])
        return quantize_slice(self._source(transfer), transfer.hf_row, transfer.hf_col, amax, block)

    def _source(self, transfer: SourceSlice) -> Tensor:
        param = self._params[transfer.source_name]
        matrix = param.view(-1, param.shape[-1] if param.ndim > 1 else 1)
        rows = slice(transfer.source_row, transfer.source_row + transfer.rows)
        return matrix[rows, transfer.source_col : transfer.source_col + transfer.cols]

    def _allocate(self, names: list[str], arch: Architecture) -> Tensor:
        """Grids of zeros for the quantised tensors of these parameters, one after the other in one buffer."""
        shapes = dict(shape for name in names for shape in _quantized_shapes(name, arch))
        self._shapes |= shapes
        grids = {name: scale_shape(self._quantization, shape) for name, shape in shapes.items()}
        sizes = [rows * cols for rows, cols in grids.values()]
        device = next(iter(self._params.values())).device
        buffer = torch.zeros(sum(sizes), device=device)
        views = zip(grids.items(), buffer.split(sizes), strict=True)
        self._amax |= {name: view.view(shape) for (name, shape), view in views}
        return buffer

    def _fill(self, name: str, arch: Architecture, tp_rank: int, tp_size: int) -> None:
        """Put into the grids what this rank's shard of a parameter knows of them."""
        row = match(name, arch)
        dim, offset = row.rule.tp_dim or 0, 0
        for piece in row.rule.pieces(arch, tp_rank, tp_size):
            if is_quantized(hf_name := row.hf[piece.source]):
                part = self._params[name].narrow(dim, offset, piece.length)
                at = (piece.start, 0) if dim == 0 else (0, piece.start)
                block = block_shape(self._quantization, self._shapes[hf_name])
                grid = self._amax[hf_name][touched_blocks(*at, tuple(part.shape), block)]
                torch.maximum(grid, block_amax(part, *at, block), out=grid)
            offset += piece.length


def _quantized_shapes(mcore_name: str, arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    row = match(mcore_name, arch)
    for hf_name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
        if is_quantized(hf_name):
            yield hf_name, shape
