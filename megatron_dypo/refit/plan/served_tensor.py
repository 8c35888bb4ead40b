"""One parameter of SGLang on one server rank, as rectangles of HF tensors. Pure, no torch, no SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.table import Layers
from megatron_dypo.refit.plan.rectangles import Rectangle


@dataclass(frozen=True, kw_only=True)
class ServedTensor:
    """One parameter of SGLang on one server rank."""

    name: str
    """``{layer}`` stands for the layer."""
    shape: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]
    """The parts of HF tensors that it holds. Its other entries are zeros, for padding."""
    matrix_columns: int | None = None
    """Columns of the matrix that the rectangles lie in; None: the tensor's last axis."""
    layers: Layers = "all"
    """The layers that have it, as in :class:`~megatron_dypo.models.families.table.Row`."""

    def is_in(self, layer: int, arch: Architecture) -> bool:
        """Return whether a layer has the parameter."""
        return self.layers == "all" or (self.layers == "experts") == arch.has_experts(layer)


def whole(name: str, shape: tuple[int, ...]) -> ServedTensor:
    return rows(name, shape, [(name, 0, shape[0])])


def rows(name: str, shape: tuple[int, ...], runs: Sequence[tuple[str, int, int]]) -> ServedTensor:
    """Return a parameter that stacks runs of rows; a run is (HF tensor, first row, number of rows)."""
    rectangles, row = [], 0
    cols = shape[-1] if len(shape) > 1 else 1
    for hf_name, start, length in runs:
        rectangles.append(
            Rectangle(name=name, row=row, col=0, hf_name=hf_name, hf_row=start, hf_col=0, rows=length, cols=cols)
        )
        row += length
    return ServedTensor(name=name, shape=shape, rectangles=tuple(rectangles))


def columns(name: str, shape: tuple[int, int], start: int) -> ServedTensor:
    """Return a parameter that holds columns of the HF tensor of the same name, beginning at ``start``."""
    rectangle = Rectangle(name=name, row=0, col=0, hf_name=name, hf_row=0, hf_col=start, rows=shape[0], cols=shape[1])
    return ServedTensor(name=name, shape=shape, rectangles=(rectangle,))
