"""Core attention with plain torch if each context-parallel rank holds a zig-zag part of every sequence.

Each rank gathers the keys and values of the whole microbatch and computes attention for its own queries. It is exact
and meant for tests and small models: Transformer Engine's ring attention never holds the keys of a whole microbatch.

Shapes: T tokens of the microbatch, of which this rank holds T/n; h query heads and g key-value heads of this
tensor-parallel rank, d channels of a head; B sequences of a bucket with K keys and Q = K/n queries each, padding
included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dypo.batching.zigzag import zigzag_indices, zigzag_positions
from megatron_dypo.mcore.attention import fused_attention, group_by_length
from megatron_dypo.mcore.sink_attention import Sinks, attend_to_all


@dataclass(frozen=True, eq=False)
class ContextBucket:
    """Sequences of similar length, processed in one call. Slots after a sequence's end repeat its last token."""

    query_N: Tensor
    """[B·Q] index of each query among this rank's tokens."""
    key_N: Tensor
    """[B·K] index of each key among the gathered tokens, which are ordered by rank."""
    position_BQ: Tensor
    """Position of each query in its sequence."""


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """How this rank's part of a packed microbatch is divided into padded buckets and put together again."""

    buckets: tuple[ContextBucket, ...]
    slot_T: Tensor
    """[T/n] position of each of this rank's tokens in the concatenation of the buckets' queries."""


@functools.lru_cache(maxsize=64)
def context_plan(cu_seqlens: tuple[int, ...], rank: int, size: int, device: torch.device) -> ContextPlan:
    """Divide the sequences of a microbatch into buckets by length, for one of ``size`` context-parallel ranks."""
    num_local = cu_seqlens[-1] // size
    gathered = np.concatenate([zigzag_indices(cu_seqlens, r, size) for r in range(size)])
    slot_of_token = np.argsort(gathered)
    slot_T, buckets, offset = np.empty(num_local, np.int64), [], 0
    lengths = [int(length) for length in np.diff(cu_seqlens)]
    for members in group_by_length(lengths):
        num_keys = lengths[members[0]]
        num_queries = num_keys // size
        query_BQ = np.empty((len(members), num_queries), np.int64)
        position_BQ = np.empty_like(query_BQ)
        key_BK = np.empty((len(members), num_keys), np.int64)
        for row, member in enumerate(members):
            positions = zigzag_positions(lengths[member], rank, size)
            own = slot_of_token[cu_seqlens[member] + positions] - rank * num_local
            slot_T[own] = offset + row * num_queries + np.arange(len(own))
            query_BQ[row] = _repeat_last(own, num_queries)
            position_BQ[row] = _repeat_last(positions, num_queries)
            keys = cu_seqlens[member] + np.arange(lengths[member])
            key_BK[row] = slot_of_token[_repeat_last(keys, num_keys)]
        arrays = (query_BQ.ravel(), key_BK.ravel(), position_BQ)
        buckets.append(ContextBucket(*(torch.from_numpy(array).to(device) for array in arrays)))
        offset += query_BQ.size
    return ContextPlan(tuple(buckets), torch.from_numpy(slot_T).to(device))


def _repeat_last(values: np.ndarray, length: int) -> np.ndarray:
    return values[np.minimum(np.arange(length), len(values) - 1)]


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, where: ContextPlan, scale: float | None = None, sinks: Sinks | None = None
) -> Tensor:
    """Compute causal attention of this rank's queries within each sequence of a packed microbatch.

    Args:
        q: [T/n, h, d] of this rank; k: [T, g, d] and v: [T, g, e] of all ranks, in rank order, with g dividing h.
        where: the microbatch's plan.
        scale: factor on the scores; None: 1/√d.
        sinks: those of the h heads; None: none.

    Returns:
        [T/n, h·e]
    """
    outputs = []
    for bucket in where.buckets:
        num_sequences = len(bucket.position_BQ)
        q_BhQd = q.index_select(0, bucket.query_N).unflatten(0, (num_sequences, -1)).transpose(1, 2)
        k_BgKd, v_BgKd = (
            x.index_select(0, bucket.key_N).unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (k, v)
        )
        # Keys in the padding of a shorter sequence are after all its queries, so the causal mask hides them.
        position_B1Q1, key_K = bucket.position_BQ[:, None, :, None], torch.arange(k_BgKd.shape[2], device=q.device)
        sees_B1QK = position_B1Q1 >= key_K
        if sinks is not None:
            if sinks.window is not None:
                sees_B1QK &= position_B1Q1 - key_K < sinks.window
            out_BhQe = attend_to_all(q_BhQd, k_BgKd, v_BgKd, sinks.logit_h, scale, sees_B1QK)
        else:
            out_BhQe = fused_attention(
                q_BhQd, k_BgKd, v_BgKd, attn_mask=sees_B1QK, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out_BhQe.transpose(1, 2).flatten(0, 1).flatten(1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return padded.index_select(0, where.slot_T)


def attend_over_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[int, ...],
    group: dist.ProcessGroup,
    scale: float | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Attend: [T/n, h, d] × [T/n, g, d] × [T/n, g, e] → [T/n, h·e]. Collective over the context-parallel ``group``.

    Args:
        cu_seqlens: boundaries of the sequences in the whole microbatch; each length is a multiple of 2n.
    """
    # Forward gathers along the first dim, backward sums the ranks' gradients and scatters them.
    kv = gather_from_sequence_parallel_region(torch.cat((k, v), dim=-1), group=group)
    where = context_plan(cu_seqlens, group.rank(), group.size(), q.device)
    keys, values = kv.split((k.shape[-1], v.shape[-1]), dim=-1)
    return attend_gathered(q, keys, values, where, scale, sinks)
