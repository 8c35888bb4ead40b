"""Microbatches split over n context-parallel ranks: rank r holds parts r and 2n−1−r of the 2n parts of each sequence
(zig-zag). Pure.

So each rank has the same share of a causal mask. Megatron-Core's rotary embedding for ``thd``
(models/common/embeddings/rope_utils.py of 0.16.1) and Transformer Engine's attention expect this order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from megatron_dypo.types import Microbatch, Tokens


def zigzag_positions(length: int, rank: int, size: int) -> npt.NDArray[np.int64]:
    """Return [length / size] positions of one sequence that ``rank`` holds, ascending. ``length`` must be a multiple of
    2·size."""
    half, rest = divmod(length, 2 * size)
    assert rest == 0, f"length={length}: pack() pads each sequence to a multiple of {2 * size}"
    mirrored = 2 * size - 1 - rank
    return np.concatenate([np.arange(first * half, (first + 1) * half) for first in (rank, mirrored)])


def zigzag_indices(cu_seqlens_S: Sequence[int] | Tokens, rank: int, size: int) -> npt.NDArray[np.int64]:
    """Return [T / size] positions of a microbatch that ``rank`` holds, ascending.

    Args:
        cu_seqlens_S: [S+1] boundaries of its sequences; each length must be a multiple of 2·size.
    """
    if size == 1:
        return np.arange(int(cu_seqlens_S[-1]))
    bounds = itertools.pairwise(int(bound) for bound in cu_seqlens_S)
    return np.concatenate([start + zigzag_positions(end - start, rank, size) for start, end in bounds])


def shard(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """Return the part of ``rank`` among ``size`` context-parallel ranks; ``cu_seqlens_S`` stays that of the whole."""
    if size == 1:
        return microbatch
    held = zigzag_indices(microbatch.cu_seqlens_S, rank, size)
    per_token = {f.name: getattr(microbatch, f.name)[held] for f in fields(microbatch) if f.name.endswith("_T")}
    streams = {name: stream_T[held] for name, stream_T in microbatch.streams.items()}
    return replace(microbatch, **per_token, streams=streams)


def local_response_mask(microbatches: Sequence[Microbatch], rank: int, size: int) -> npt.NDArray[np.bool_]:
    """Return, for all response tokens of whole ``microbatches`` in order, whether ``rank`` of ``size`` holds them."""
    masks = [np.zeros(0, np.bool_)]
    for microbatch in microbatches:
        is_held_T = np.zeros(len(microbatch.response_T), np.bool_)
        is_held_T[zigzag_indices(microbatch.cu_seqlens_S, rank, size)] = True
        masks.append(is_held_T[microbatch.response_T])
    return np.concatenate(masks)
