"""How one Megatron-Core parameter is laid out in terms of HF tensors: pure, no I/O, no process group.

A rule answers one question, :meth:`Rule.pieces`: which runs of rows (or columns) of which HF tensors make up the local
shard of a tensor-parallel rank, in order. Splitting and merging both use this list, so they cannot disagree. Shapes are
those of the ``local`` layer spec; TE's modules hold the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dypo.checks import require_divides
from megatron_dypo.models.architecture import Architecture

Shape = tuple[int, ...]
ShapeOf = Callable[[Architecture], Shape]


class Sliceable(Protocol):
    """A tensor, or a lazy safetensors slice: reads what is indexed and nothing else."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """``length`` consecutive entries of HF tensor number ``source``, from ``start``, along the rule's split dim."""

    source: int
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A run of a local shard along the split dim, and its place in the stored tensor."""

    local_start: int
    stored_start: int
    length: int


@dataclass(frozen=True)
class Rule:
    """One kind of layout. Subclasses define only shapes and pieces."""

    @property
    def tp_dim(self) -> int | None:
        """Return the dim that tensor parallelism splits; None: every rank holds the whole tensor."""
        return 0

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        """Return the shapes of the HF tensors of one row."""
        raise NotImplementedError

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        """Return the pieces of the local shard of ``tp_rank`` in order, without padding."""
        raise NotImplementedError

    def mcore_shape(self, arch: Architecture, tp_size: int) -> Shape:
        """Return the shape of the parameter on each of ``tp_size`` ranks."""
        shapes = self.hf_shapes(arch)
        if self.tp_dim is None:
            return shapes[0]
        total = sum(shape[self.tp_dim] for shape in shapes)
        return _resized(shapes[0], self.tp_dim, _divide(total, tp_size, "size of the split dim"))

    def shard(self, hf_tensors: Sequence[Sliceable | Tensor], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        """Return the parameter of ``tp_rank``: contiguous, HF dtype, padding filled with zeros.

        Raises:
            ValueError: ``tp_size`` does not divide the architecture.
        """
        dim = self.tp_dim or 0
        before = (slice(None),) * dim
        parts = [
            hf_tensors[piece.source][(*before, slice(piece.start, piece.start + piece.length))]
            for piece in self.pieces(arch, tp_rank, tp_size)
        ]
        shape = self.mcore_shape(arch, tp_size)
        padding = shape[dim] - sum(part.shape[dim] for part in parts)
        if padding:
            like = parts[0] if parts else hf_tensors[0][(slice(0, 0),)]
            parts.append(like.new_zeros(_resized(shape, dim, padding)))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        """Return the HF tensors of a row from the shards of all ranks, in rank order; padding is cut off."""
        if self.tp_dim is None:
            return (shards[0],)
        outputs = tuple(shards[0].new_empty(shape) for shape in self.hf_shapes(arch))
        for tp_rank, shard in enumerate(shards):
            offset = 0
            for piece in self.pieces(arch, tp_rank, len(shards)):
                target = outputs[piece.source].narrow(self.tp_dim, piece.start, piece.length)
                target.copy_(shard.narrow(self.tp_dim, offset, piece.length))
                offset += piece.length
        return outputs

    def stored_shape(self, arch: Architecture, tp_size: int) -> Shape:
        """Return the shape of one layer's whole tensor in a checkpoint; ``tp_size`` changes only its padding."""
        shape = self.mcore_shape(arch, tp_size)
        return shape if self.tp_dim is None else _resized(shape, self.tp_dim, shape[self.tp_dim] * tp_size)

    def chunks(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Chunk]:
        """Return the chunks of the stored tensor that ``tp_rank`` writes; the first rank writes a replicated tensor."""
        shape = self.mcore_shape(arch, tp_size)
        if self.tp_dim is None:
            return [Chunk(0, 0, shape[0])] if tp_rank == 0 else []
        return [Chunk(0, tp_rank * shape[self.tp_dim], shape[self.tp_dim])]

    def scatter(self, part: Tensor, start: Shape, outputs: Sequence[Tensor], arch: Architecture) -> None:
        """Copy ``part``, which begins at index ``start`` of the stored tensor, to its place in the HF tensors."""
        dim = self.tp_dim or 0
        where = [slice(at, at + size) for at, size in zip(start, part.shape, strict=True)]
        end, offset = start[dim] + part.shape[dim], 0
        for piece in self.pieces(arch, 0, 1):
            low, high = max(start[dim], offset), min(end, offset + piece.length)
            if low < high:
                first = piece.start + low - offset
                where[dim] = slice(first, first + high - low)
                outputs[piece.source][tuple(where)].copy_(part.narrow(dim, low - start[dim], high - low))
            offset += piece.length


@dataclass(frozen=True)
class Copy(Rule):
    """Replicated on every tensor-parallel rank: norms."""

    shape: ShapeOf

    @property
    def tp_dim(self) -> int | None:
        return None

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return (self.shape(arch),)

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        return [Piece(0, 0, self.shape(arch)[0])]


@dataclass(frozen=True)
class ColumnParallel(Rule):
    """A linear layer whose output features are split into equal runs, in HF's order: queries, keys and values from
    latent vectors."""

    shape: ShapeOf

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return (self.shape(arch),)

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        local = _divide(self.shape(arch)[0], tp_size, "output features")
        return [Piece(0, tp_rank * local, local)]


@dataclass(frozen=True)
class RowParallel(Rule):
    """A linear layer whose input features are split: attention and MLP outputs."""

    shape: ShapeOf

    @property
    def tp_dim(self) -> int | None:
        return 1

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return (self.shape(arch),)

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        local = _divide(self.shape(arch)[1], tp_size, "input features")
        return [Piece(0, tp_rank * local, local)]


@dataclass(frozen=True)
class Vocab(Rule):
    """[V, H] split by vocabulary entry, padded with zero rows to a multiple of ``tp_size``."""

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.vocab_size, arch.hidden_size),)

    def mcore_shape(self, arch: Architecture, tp_size: int) -> Shape:
        return (arch.padded_vocab_size(tp_size) // tp_size, arch.hidden_size)

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        local = arch.padded_vocab_size(tp_size) // tp_size
        start = min(tp_rank * local, arch.vocab_size)
        length = min(local, arch.vocab_size - start)
        return [Piece(0, start, length)] if length else []


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections in one tensor: for each group its query heads, its key head, its value head."""

    bias: bool = False

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        rows = (arch.num_attention_heads, arch.num_key_value_heads, arch.num_key_value_heads)
        tail = () if self.bias else (arch.hidden_size,)
        return tuple((heads * arch.head_dim, *tail) for heads in rows)

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        """Return equal runs of rows. With more ranks than groups, a run may end within a group, even within a head."""
        _check_heads(arch, tp_size)
        heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
        query = heads // kv_heads * arch.head_dim
        local = _divide((heads + 2 * kv_heads) * arch.head_dim, tp_size, "rows of query, key and value")
        start, offset, pieces = tp_rank * local, 0, []
        for group in range(kv_heads):
            for source, length in ((0, query), (1, arch.head_dim), (2, arch.head_dim)):
                low, high = max(start, offset), min(start + local, offset + length)
                if low < high:
                    pieces.append(Piece(source, group * length + low - offset, high - low))
                offset += length
        return pieces


def mlp_input(arch: Architecture) -> Shape:
    return (arch.ffn_hidden_size, arch.hidden_size)


@dataclass(frozen=True)
class GateUp(Rule):
    """Both input projections of a gated MLP: each rank has its rows of the gate, then its rows of the up projection."""

    shape: ShapeOf = mlp_input
    """Shape of one projection."""

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return (self.shape(arch),) * 2

    def pieces(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Piece]:
        local = _divide(self.shape(arch)[0], tp_size, "ffn_hidden_size")
        return [Piece(0, tp_rank * local, local), Piece(1, tp_rank * local, local)]

    def chunks(self, arch: Architecture, tp_rank: int, tp_size: int) -> list[Chunk]:
        width = self.shape(arch)[0]
        local = _divide(width, tp_size, "ffn_hidden_size")
        return [Chunk(0, tp_rank * local, local), Chunk(local, width + tp_rank * local, local)]


def _check_heads(arch: Architecture, tp_size: int) -> None:
    """Raise ValueError unless ranks divide the groups of heads or share each group evenly, as Megatron-Core
    requires."""
    _divide(arch.num_attention_heads, tp_size, "num_attention_heads")
    kv_heads = arch.num_key_value_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        raise ValueError(f"tensor_parallel={tp_size} does not divide num_key_value_heads={kv_heads}, nor the reverse")


def _divide(value: int, tp_size: int, name: str) -> int:
    require_divides("tensor_parallel", tp_size, name, value)
    return value // tp_size


def _resized(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])
