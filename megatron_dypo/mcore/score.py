"""Log-probs of whole sequences under the current weights: packed, forward only, answered on the replica's leader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.pack import bins_first_fit, pack, padded_lengths, row_length
from megatron_dypo.batching.zigzag import held_responses, shard
from megatron_dypo.mcore.forward_step import logprob_pass
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.types import Floats, Microbatch, Sample


def row_alignment(layout: Layout) -> int:
    """A packed row splits over context-parallel ranks, and each part over tensor-parallel ones (sequence parallelism)."""
    return math.lcm(sequence_alignment(layout), layout.tensor * layout.context)


def sequence_alignment(layout: Layout) -> int:
    """A sequence splits into two chunks for each context-parallel rank."""
    return 2 * layout.context if layout.context > 1 else 1


def round_up_microbatches(count: int, layout: Layout) -> int:
    """The interleaved schedule takes microbatches in groups of the pipeline size."""
    step = layout.pipeline if layout.virtual_pipeline > 1 else 1
    return -(-max(count, 1) // step) * step


def sequence_logprobs(
    chunks: Sequence[Any], samples: Sequence[Sample], *, layout: Layout, budget: int
) -> list[Floats] | None:
    """log π of each sample's response tokens; collective over the replica, every rank passes the same samples.

    Args:
        budget: tokens in one packed row.

    Returns:
        On the replica's leader one [R] array for each sample, in order; None on the other ranks.
    """
    if not samples:
        return [] if layout.is_replica_leader else None
    alignment = sequence_alignment(layout)
    lengths = padded_lengths(samples, alignment)
    bins = bins_first_fit(lengths, budget)
    bins += [[] for _ in range(round_up_microbatches(len(bins), layout) - len(bins))]
    length = row_length(lengths, bins, row_alignment(layout))
    rows = [pack(samples, members, length, alignment) for members in bins]
    set_training(chunks, False)
    parts = logprob_pass(chunks, [shard(row, layout.cp_rank, layout.context) for row in rows])
    set_training(chunks, True)
    flat = _to_leader(torch.cat(parts) if parts else None, rows, layout)
    if flat is None:
        return None
    order = [i for members in bins for i in members]
    pieces = np.split(flat, np.cumsum([samples[i].num_response_tokens for i in order])[:-1])
    by_sample = dict(zip(order, pieces, strict=True))
    return [by_sample[i] for i in range(len(samples))]


def set_training(chunks: Sequence[Any], mode: bool) -> None:
    for chunk in chunks:
        chunk.train(mode)


def _to_leader(own: torch.Tensor | None, rows: Sequence[Microbatch], layout: Layout) -> Floats | None:
    """Log-probs of all response tokens of ``rows``, in their order, on the leader, and nowhere else.

    They come from the last stage's ranks of tensor-parallel rank 0, each with its zig-zag part.
    """
    if not layout.is_replica_leader:
        if layout.rank in layout.scoring_ranks:
            assert own is not None, "the last stage scores"
            dist.send(own, dst=layout.leader_rank, group=layout.replica_group)
        return None
    flat = np.empty(sum(int(row.response_T.sum()) for row in rows), np.float32)
    for cp_rank, source in enumerate(layout.scoring_ranks):
        is_held = held_responses(rows, cp_rank, layout.context)
        if source == layout.rank:
            assert own is not None, "the last stage scores"
            part = own
        else:
            part = torch.empty(int(is_held.sum()), dtype=torch.float32)
            dist.recv(part, src=source, group=layout.replica_group)
        flat[is_held] = part.numpy()
    return flat
