"""Rectangles of tensors at the coordinates of a plan, and the slices that a trainer rank sends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.refit.plan.refit_plan import Transfer


class SliceSource(Protocol):
    """Returns the slices of one refit. It is called once for each transfer, in the order of the link."""

    def slice(self, transfer: Transfer) -> Tensor:
        """Return [rows, cols] of a transfer, as a view if possible."""
        ...


class ShardValues:
    """The values of this rank's parameters by name. Those of parameters in FP8 are computed when they are asked for."""

    def __init__(
        self, named_params: Iterable[tuple[str, Tensor]], arch: Architecture, values: Callable[[Tensor], Tensor]
    ) -> None:
        """``values`` returns a parameter, or a dequantised copy."""
        self._params = {match(name, arch).mcore: param.detach() for name, param in named_params}
        self._values = values
        # A copy for each thread: a link asks for several slices of a parameter in a row, on a stream of its own.
        self._last = threading.local()

    def __getitem__(self, name: str) -> Tensor:
        if getattr(self._last, "name", None) != name:
            self._last.name = None  # should the computation fail
            self._last.value = None  # freed before the next copy is made
            self._last.value = self._values(self._params[name])
            self._last.name = name
        value: Tensor = self._last.value
        return value

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next(iter(self._params.values())).device


class ShardSlices:
    """Slices of this rank's parameters without quantisation."""

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        arch: Architecture,
        values: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        """See :class:`ShardValues`."""
        self._params = ShardValues(named_params, arch, values)

    def slice(self, transfer: Transfer) -> Tensor:
        """Return a view of the parameter."""
        param = self._params[transfer.source_name]
        return rectangle(param, transfer.source_row, transfer.source_col, transfer.rows, transfer.cols)


def matrix(tensor: Tensor) -> Tensor:
    """View a tensor as a plan's matrix: the last dim becomes the columns, all others the rows; a vector is a column."""
    return tensor.view(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def rectangle(tensor: Tensor, row: int, col: int, rows: int, cols: int) -> Tensor:
    """Return the [rows, cols] view into :func:`matrix`.

    Raises:
        ValueError: the rectangle is outside of the matrix.
    """
    whole = matrix(tensor)
    if row + rows > whole.shape[0] or col + cols > whole.shape[1]:
        raise ValueError(f"rows {row}+{rows}, columns {col}+{cols} lie outside a matrix of {tuple(whole.shape)}")
    return whole[row : row + rows, col : col + cols]
