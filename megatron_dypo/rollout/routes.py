"""The experts that a server chose for each token, as SGLang returns them with ``--enable-return-routed-experts``.

An answer has them as base64 of int32 [L − 1, layers, k], of the prompt and the response but its last token
(srt/managers/io_struct.py, ``routed_experts_start_len``, of 0.5.23). Here they are kept in the smallest type, since
they are the largest part of a rollout: 8 experts in each of 94 layers are 752 bytes a token.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pybase64

from megatron_dypo.types import Routes

_ON_DISK_BYTES = 8 * 2**20
"""Size of a group's routes from which on they are kept on disk."""
_PIECE = 2**19
"""Characters that are decoded at a time, well below a millisecond: a multiple of 16, which are three experts."""


class RoutesError(ValueError):
    """An answer without the routes of every token."""


@dataclass(frozen=True, kw_only=True)
class RouteShape:
    """The sizes of a model's routes."""

    num_layers: int
    """Layers of the model, those without experts included."""
    per_token: int
    """k: experts of one token in one layer."""
    num_experts: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of an expert's number. Its largest value is never an expert."""
        return np.dtype(np.uint8 if self.num_experts < np.iinfo(np.uint8).max else np.uint16)

    @property
    def unknown(self) -> int:
        """The value in place of experts that are not known."""
        return int(np.iinfo(self.dtype).max)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token's routes."""
        return self.num_layers * self.per_token * self.dtype.itemsize

    @property
    def answer_bytes_per_token(self) -> int:
        """Return the bytes of one token's routes in an answer: 4 for each expert, in base64."""
        return -(-self.num_layers * self.per_token * 4 * 4 // 3)


def allocate(shapes: Sequence[tuple[int, ...]], dtype: np.dtype[np.unsignedinteger[Any]]) -> list[Routes]:
    """Return arrays for the routes of several sequences, whose values are not set.

    Large ones lie together in one file without a name in the folder for temporary files (``TMPDIR``), from where the
    system brings pages into memory and takes them away again. The file goes with the last array, or with the process.

    Raises:
        OSError: that folder has too little space.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    if total * dtype.itemsize < _ON_DISK_BYTES:
        whole = np.empty(total, dtype)
    else:
        with tempfile.TemporaryFile(prefix="megatron-dypo-routes-") as file:
            os.posix_fallocate(file.fileno(), 0, total * dtype.itemsize)  # else a full disk would be a SIGBUS later
            whole = np.memmap(file, dtype, mode="r+", shape=(total,))
    ends = np.cumsum([0, *sizes])
    return [whole[start:end].reshape(shape) for start, end, shape in zip(ends, ends[1:], shapes, strict=False)]


def read_routes(encoded: Sequence[Any], num_tokens: Sequence[int], shape: RouteShape) -> list[Routes]:
    """Return the [L − 1, layers, k] routes of each of several sequences.

    Args:
        encoded: ``meta_info.routed_experts`` of each answer, of any type; a text may be a memoryview of its bytes.
        num_tokens: L of each, tokens of prompt and response.

    Raises:
        RoutesError: one is not the base64 of that many routes, or names an expert that the model does not have.
    """
    sizes = [(count - 1, shape.num_layers, shape.per_token) for count in num_tokens]
    for text, size in zip(encoded, sizes, strict=True):
        _require_text(text, size)
    routes = allocate(sizes, shape.dtype)
    for text, into in zip(encoded, routes, strict=True):
        _decode(text, into.reshape(-1), shape.num_experts)
    return routes


def _require_text(encoded: Any, size: tuple[int, ...]) -> None:
    if not isinstance(encoded, str | memoryview):
        raise RoutesError("no routed_experts: the server needs --enable-return-routed-experts")
    num_bytes = 4 * math.prod(size)
    if len(encoded) != 4 * -(-num_bytes // 3):
        raise RoutesError(
            f"routed_experts of {len(encoded)} characters: must be base64 of int32 of shape {list(size)}, "
            f"{4 * -(-num_bytes // 3)} characters"
        )


def _decode(encoded: str | memoryview, into: npt.NDArray[np.unsignedinteger[Any]], num_experts: int) -> None:
    """Decode piece by piece, so that other threads need not wait for long."""
    filled = 0
    for start in range(0, len(encoded), _PIECE):
        experts = _decode_piece(encoded[start : start + _PIECE], num_experts)
        if filled + len(experts) > len(into):
            break
        into[filled : filled + len(experts)] = experts
        filled += len(experts)
    if filled != len(into):
        raise RoutesError(f"routed_experts: the base64 of {filled} experts: must be {len(into)}")


def _decode_piece(piece: str | memoryview, num_experts: int) -> npt.NDArray[Any]:
    try:
        experts = np.frombuffer(pybase64.b64decode(piece, validate=True), dtype="<i4")
    except ValueError as error:
        raise RoutesError(f"routed_experts: no base64 of int32: {error}") from error
    # As numbers without sign, those below 0 are large.
    if len(experts) and int(experts.view("<u4").max()) >= num_experts:
        raise RoutesError(f"routed_experts from {experts.min()} to {experts.max()}: must be in [0, {num_experts})")
    return experts
