"""FP8 slices of this rank's parameters. They equal slices of the whole tensors quantised offline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.quantized.blocks import block_amax, quantize_slice, scales_of, touched_blocks
from megatron_dypo.models.quantized.names import Quantization, block_shape, is_quantized, scale_shape, weight_name
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.refit.plan.refit_plan import Transfer
from megatron_dypo.refit.slices import ShardValues, rectangle


class ShardQuantizer:
    """Returns slices of one rank's parameters during one refit. Parameters must not change while it is in use.

    Its construction is collective over ``tp_group`` and ``etp_group`` (if they have more than one rank). Each rank
    computes its part of every block's amax. Two all-reduces combine the parts: one for all experts, one for all other
    tensors. Memory besides the parameters: one fp32 number for each block of the tensors that this rank has a part of,
    and one slice.

    Raises:
        ValueError: no rule matches a parameter.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        arch: Architecture,
        layout: MeshRank,
        quantization: Quantization,
        values: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        named = [(match(name, arch), param) for name, param in named_params]
        self._arch, self._quantization = arch, quantization
        self._params = ShardValues(((row.mcore, param) for row, param in named), arch, values)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._amax: dict[str, Tensor] = {}
        dense, experts = ([row for row, _ in named if row.is_expert is kind] for kind in (False, True))
        self._make_grids(dense, layout.tp_rank, layout.tensor, layout.tp_group)
        self._make_grids(experts, layout.etp_rank, layout.expert_tensor, layout.etp_group)

    def slice(self, transfer: Transfer) -> Tensor:
        """Return e4m3 values, fp32 scales, or the values of a tensor that is not quantised. The result is
        contiguous."""
        if transfer.part == "scale":
            amax = self._amax[weight_name(transfer.hf_name)]
            rows = slice(transfer.hf_row, transfer.hf_row + transfer.rows)
            return scales_of(amax[rows, transfer.hf_col : transfer.hf_col + transfer.cols])
        if not is_quantized(transfer.hf_name):
            return self._source(transfer).contiguous()
        amax = self._amax[transfer.hf_name]
        block = block_shape(self._quantization, self._shapes[transfer.hf_name])
        return quantize_slice(self._source(transfer), transfer.hf_row, transfer.hf_col, amax, block)

    def _source(self, transfer: Transfer) -> Tensor:
        param = self._params[transfer.source_name]
        return rectangle(param, transfer.source_row, transfer.source_col, transfer.rows, transfer.cols)

    def _make_grids(self, rows: Sequence[Row], rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        """Compute the grids of amax values of some parameters, over all ranks of ``group``."""
        buffer = self._allocate(rows)
        for row in rows:
            self._fill(row, rank, size)
        if size > 1:
            dist.all_reduce(buffer, dist.ReduceOp.MAX, group=group)

    def _allocate(self, rows: Sequence[Row]) -> Tensor:
        """Make grids of zeros for the quantised tensors of these parameters, all in one buffer."""
        shapes = {
            name: shape
            for row in rows
            for name, shape in zip(row.hf, row.rule.hf_shapes(self._arch), strict=True)
            if is_quantized(name)
        }
        grids = {name: scale_shape(self._quantization, shape) for name, shape in shapes.items()}
        sizes = [num_rows * num_cols for num_rows, num_cols in grids.values()]
        buffer = torch.zeros(sum(sizes), device=self._params.device)
        views = zip(grids.items(), buffer.split(sizes), strict=True)
        self._amax |= {name: view.view(grid) for (name, grid), view in views}
        self._shapes |= shapes
        return buffer

    def _fill(self, row: Row, rank: int, size: int) -> None:
        """Write the amax values of shard ``rank`` of ``size`` into the grids."""
        dim, offset = row.rule.tp_dim or 0, 0
        for piece in row.rule.pieces(self._arch, rank, size):
            if is_quantized(name := row.hf[piece.source]):
                part = self._params[row.mcore].narrow(dim, offset, piece.length)
                at = (piece.start, 0) if dim == 0 else (0, piece.start)
                block = block_shape(self._quantization, self._shapes[name])
                grid = self._amax[name][touched_blocks(*at, tuple(part.shape), block)]
                torch.maximum(grid, block_amax(part, *at, block), out=grid)
            offset += piece.length
