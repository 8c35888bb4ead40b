"""The rule of an expert's input projections, which tensor parallelism does not split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.rules import Chunk, Piece, Rule, Shape, ShapeOf


@dataclass(frozen=True)
class Stack(Rule):
    """HF tensors below each other, whole on every rank that holds them: the input projections of an expert."""

    shapes: tuple[ShapeOf, ...]

    @property
    def tp_dim(self) -> int | None:
        return None

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return tuple(shape(arch) for shape in self.shapes)

    def mcore_shape(self, arch: Architecture, tp_size: int) -> Shape:
        shapes = self.hf_shapes(arch)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        return [Piece(source, 0, shape[0]) for source, shape in enumerate(self.hf_shapes(arch))]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return shards[0].split([shape[0] for shape in self.hf_shapes(arch)])

    def chunks(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Chunk]:
        lengths = [shape[0] for shape in self.hf_shapes(arch)] if tp_rank == 0 else []
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        return [Chunk(start, start, length) for start, length in zip(starts, lengths, strict=True)]
