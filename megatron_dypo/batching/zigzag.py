"""Packed rows cut over context-parallel ranks: of each sequence, chunks r and 2n−1−r of 2n (zig-zag). Pure.

So each rank has the same share of a causal mask. It is the order that Megatron-Core's rotary embedding for ``thd``
(models/common/embeddings/rope_utils.py of 0.16.1) and Transformer Engine's attention take for granted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from megatron_dypo.types import Microbatch, Tokens


def zigzag_positions(length: int, rank: int, size: int) -> npt.NDArray[np.int64]:
    """[length / size] positions of one sequence that ``rank`` of ``size`` holds, ascending; 2·size divides ``length``."""
    chunk, rest = divmod(length, 2 * size)
    assert rest == 0, f"length={length}: pack() pads each sequence to a multiple of {2 * size}"
    mirrored = 2 * size - 1 - rank
    return np.concatenate([np.arange(first * chunk, (first + 1) * chunk) for first in (rank, mirrored)])


def zigzag_indices(cu_seqlens_S: Sequence[int] | Tokens, rank: int, size: int) -> npt.NDArray[np.int64]:
    """[T / size] positions of a row that ``rank`` holds, ascending.

    Args:
        cu_seqlens_S: [S+1] boundaries of its sequences; 2·size divides each length.
    """
    if size == 1:
        return np.arange(int(cu_seqlens_S[-1]))
    bounds = itertools.pairwise(int(bound) for bound in cu_seqlens_S)
    return np.concatenate([start + zigzag_positions(end - start, rank, size) for start, end in bounds])


def shard(row: Microbatch, rank: int, size: int) -> Microbatch:
    """What ``rank`` of ``size`` context-parallel ranks holds of a row; ``cu_seqlens_S`` stays that of the whole row."""
    if size == 1:
        return row
    indices = zigzag_indices(row.cu_seqlens_S, rank, size)
    streams = {f.name: getattr(row, f.name)[indices] for f in fields(row) if f.name.endswith("_T")}
    return replace(row, **streams)


def held_responses(rows: Sequence[Microbatch], rank: int, size: int) -> npt.NDArray[np.bool_]:
    """Which of all response tokens of whole ``rows``, in their order, ``rank`` of ``size`` holds."""
    held = [np.zeros(0, np.bool_)]
    for row in rows:
        is_held_T = np.zeros(len(row.response_T), np.bool_)
        is_held_T[zigzag_indices(row.cu_seqlens_S, rank, size)] = True
        held.append(is_held_T[row.response_T])
    return np.concatenate(held)
