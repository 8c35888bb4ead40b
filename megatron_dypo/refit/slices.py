"""Rectangles of tensors, as a plan's coordinates give them, and the slices that a trainer rank sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.refit.plan.refit_plan import Transfer


class SliceSource(Protocol):
    """Gives the slices of one refit; is asked once for each transfer, in the order of its link."""

    def slice(self, transfer: Transfer) -> Tensor:
        """Return [rows, cols] of a transfer; a view where that is possible."""
        ...


class ShardSlices:
    """Slices of this rank's parameters as they are."""

    def __init__(self, named_params: Iterable[tuple[str, Tensor]], arch: Architecture) -> None:
        self._params = {match(name, arch).mcore: param.detach() for name, param in named_params}

    def slice(self, transfer: Transfer) -> Tensor:
        """Return a view of the parameter."""
        param = self._params[transfer.source_name]
        return rectangle(param, transfer.source_row, transfer.source_col, transfer.rows, transfer.cols)


def matrix(tensor: Tensor) -> Tensor:
    """View a tensor as a plan counts it: the last dim is the columns, all others are rows; a vector is one column."""
    return tensor.view(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def rectangle(tensor: Tensor, row: int, col: int, rows: int, cols: int) -> Tensor:
    """Return the [rows, cols] view into :func:`matrix`.

    Raises:
        ValueError: the rectangle lies outside.
    """
    whole = matrix(tensor)
    if row + rows > whole.shape[0] or col + cols > whole.shape[1]:
        raise ValueError(f"rows {row}+{rows}, columns {col}+{cols} lie outside a matrix of {tuple(whole.shape)}")
    return whole[row : row + rows, col : col + cols]
