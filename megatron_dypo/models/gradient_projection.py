"""Linear maps from a model's whole gradient to a short vector, the same in every parallel layout.

An entry of the gradient is addressed by its HF tensor and its place in that tensor. What the map does with an entry
depends on this address and the seed alone, so each rank projects the parts that it holds, and the sum over the ranks is
the projection of the whole gradient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dypo.checks import require
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.families.table import Row

BLOCK = {"cpu": 2**17, "cuda": 2**24}
"""Entries that are hashed at a time, by type of device: few enough for a CPU's cache, enough for a GPU's cores. A block
takes 8 bytes of scratch memory an entry."""
KEPT_ENTRIES = 2**24
"""A rank with at most this number of entries keeps their slots (4 bytes each) and hashes them once."""


class GradientMap(Protocol):
    """A linear map from gradients to [d]."""

    @property
    def size(self) -> int:
        """Return d."""

    def slots(self, hf_name: str, row_R: Tensor, column_C: Tensor, columns: int) -> Tensor:
        """Return [R, C] where entries of an HF tensor are added: s < d with sign +1, or s = d + t with sign −1 at t.

        Args:
            row_R: rows of the entries.
            column_C: columns of the entries.
            columns: columns of the whole tensor.
        """


class RandomProjection:
    """A sparse random projection: every entry is added to one of d sums, with a random sign (count sketch; Charikar,
    Chen and Farach-Colton 2002; as feature hashing, Weinberger et al. 2009, arXiv 0902.2206).

    Inner products and squared norms of projections are unbiased estimates of those of the gradients, over the draw of
    the seed. The standard deviation of ⟨x, y⟩ is at most about sqrt(2/d)·|x|·|y|.
    """

    def __init__(self, size: int, seed: int) -> None:
        """
        Args:
            size: d, a power of two from 2 to 2^24.

        Raises:
            ValueError: ``size`` is no such number.
        """
        require(2 <= size <= 2**24 and size.bit_count() == 1, f"size={size}", "must be a power of two from 2 to 2^24")
        self.size, self._seed = size, seed

    def slots(self, hf_name: str, row_R: Tensor, column_C: Tensor, columns: int) -> Tensor:
        digest = hashlib.blake2b(f"{self._seed}:{hf_name}".encode(), digest_size=16).digest()
        of_rows, of_columns = (int.from_bytes(part, "little", signed=True) for part in (digest[:8], digest[8:]))
        # Sums of a row's and a column's key are mixed again: by themselves they repeat at the corners of rectangles.
        # 32 bits are enough, and CPUs multiply twice as many of them at a time.
        key_RC = _mix(row_R + of_rows).to(torch.int32)[:, None] + _mix(column_C + of_columns).to(torch.int32)
        key_RC.mul_(_MURMUR[0]).bitwise_xor_(key_RC >> 15).mul_(_MURMUR[1])
        return key_RC.bitwise_right_shift_(31 - self.size.bit_length()).bitwise_and_(2 * self.size - 1)


class WholeGradient:
    """The identity, for small models: d is the number of parameters, in the order of the family's table."""

    def __init__(self, arch: Architecture) -> None:
        self._starts: dict[str, int] = {}
        self.size = 0
        for row in family_rows(arch):
            for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
                if name not in self._starts:  # tied embeddings have two rows
                    self._starts[name] = self.size
                    self.size += math.prod(shape)

    def slots(self, hf_name: str, row_R: Tensor, column_C: Tensor, columns: int) -> Tensor:
        return row_R[:, None] * columns + column_C + self._starts[hf_name]


class ShardProjector:
    """Applies a map to the shards of gradients that one rank holds."""

    def __init__(self, gradient_map: GradientMap, arch: Architecture) -> None:
        self.size = gradient_map.size
        self._map, self._arch = gradient_map, arch
        self._kept: dict[_Place, Tensor] = {}
        self._num_kept = 0

    def add(self, total_D: Tensor, gradient: Tensor, row: Row, rank: int, size: int) -> None:
        """Add the projection of one parameter's gradient to ``total_D``, [2d] float64: sums to add, then to subtract.

        Args:
            gradient: of the parameter that ``row`` describes.
            rank: of the axis that splits the parameter.
            size: of that axis.
        """
        part_D = torch.zeros(len(total_D), dtype=gradient.dtype, device=gradient.device)
        for block, place in self._blocks(gradient, row, rank, size):
            part_D.index_add_(0, self._slots(block, place), block.reshape(-1))
        total_D += part_D

    def signed(self, total_D: Tensor) -> Tensor:
        """Return [d] from the [2d] sums of :meth:`add`."""
        return total_D[: self.size] - total_D[self.size :]

    def _blocks(self, gradient: Tensor, row: Row, rank: int, size: int) -> Iterator[tuple[Tensor, _Place]]:
        """Yield the parts of a shard, as matrices, with their places in HF tensors; padding is left out."""
        shapes, dim, offset = row.rule.hf_shapes(self._arch), row.rule.tp_dim or 0, 0
        for piece in row.rule.pieces(self._arch, rank, size):
            part, shape = gradient.narrow(dim, offset, piece.length), shapes[piece.source]
            offset += piece.length
            part = part if part.ndim > 1 else part[:, None]
            first_row, first_column = (piece.start, 0) if dim == 0 else (0, piece.start)
            step = max(1, BLOCK[gradient.device.type] // part.shape[1])
            for start in range(0, len(part), step):
                yield (
                    part[start : start + step],
                    _Place(
                        hf_name=row.hf[piece.source],
                        row=first_row + start,
                        column=first_column,
                        columns=shape[1] if len(shape) > 1 else 1,
                    ),
                )

    def _slots(self, block: Tensor, place: _Place) -> Tensor:
        if (kept := self._kept.get(place)) is not None:
            return kept
        rows, columns = block.shape
        row_R = torch.arange(place.row, place.row + rows, device=block.device)
        column_C = torch.arange(place.column, place.column + columns, device=block.device)
        slots = self._map.slots(place.hf_name, row_R, column_C, place.columns).reshape(-1)
        if self._num_kept + slots.numel() <= KEPT_ENTRIES:
            self._kept[place] = slots = slots.to(torch.int32)
            self._num_kept += slots.numel()
        return slots


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The place of a block in an HF tensor."""

    hf_name: str
    row: int
    """The first row of the block."""
    column: int
    """Its first column."""
    columns: int
    """Columns of the whole tensor."""


def _mix(value: Tensor) -> Tensor:
    """Return the finaliser of splitmix64 (Steele, Lea and Flood 2014) of int64 values: each bit depends on all bits."""
    value = value * _GOLDEN
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros; torch's shift of a signed number fills with its sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int, bits: int = 64) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value


_GOLDEN, _FIRST, _SECOND = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MURMUR = (_signed(0x85EBCA6B, 32), _signed(0xC2B2AE35, 32))
"""Factors of MurmurHash3's 32-bit finaliser (Appleby 2011)."""
