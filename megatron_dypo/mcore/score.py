"""Log-probs of whole sequences under the current weights: packed, forward only, answered on the replica's leader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.pack import bins_first_fit, pack, row_length
from megatron_dypo.mcore.forward_step import logprob_pass
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.types import Floats, Sample


def row_alignment(layout: Layout) -> int:
    """A packed row's length must split evenly over the tensor-parallel ranks (sequence parallelism)."""
    return layout.tensor


def round_up_microbatches(count: int, layout: Layout) -> int:
    """The interleaved schedule takes microbatches in groups of the pipeline size."""
    step = layout.pipeline if layout.virtual_pipeline > 1 else 1
    return -(-max(count, 1) // step) * step


def sequence_logprobs(
    chunks: Sequence[Any], samples: Sequence[Sample], *, layout: Layout, budget: int
) -> list[Floats] | None:
    """log π of each sample's response tokens; collective over the replica, every rank passes the same samples.

    Replicas that share out experts run as many forward passes as the one with the most: then it is collective over all.

    Args:
        budget: tokens in one packed row.

    Returns:
        On the replica's leader one [R] array for each sample, in order; None on the other ranks.
    """
    lengths = [len(sample.tokens) for sample in samples]
    bins = bins_first_fit(lengths, budget)
    count = _most(len(bins)) if layout.expert > 1 else len(bins)
    if not count:
        return _nothing(layout)
    bins += [[] for _ in range(round_up_microbatches(count, layout) - len(bins))]
    length = row_length(lengths, bins, row_alignment(layout))
    rows = [pack(samples, members, length) for members in bins]
    set_training(chunks, False)
    parts = logprob_pass(chunks, rows)
    set_training(chunks, True)
    if not samples:
        return _nothing(layout)
    flat = _to_leader(torch.cat(parts) if parts else None, sum(s.num_response_tokens for s in samples), layout)
    if flat is None:
        return None
    order = [i for members in bins for i in members]
    pieces = np.split(flat, np.cumsum([samples[i].num_response_tokens for i in order])[:-1])
    by_sample = dict(zip(order, pieces, strict=True))
    return [by_sample[i] for i in range(len(samples))]


def _nothing(layout: Layout) -> list[Floats] | None:
    return [] if layout.is_replica_leader else None


def _most(count: int) -> int:
    """The largest of all ranks' counts."""
    most = torch.tensor([count], device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def set_training(chunks: Sequence[Any], mode: bool) -> None:
    for chunk in chunks:
        chunk.train(mode)


def _to_leader(logp: torch.Tensor | None, size: int, layout: Layout) -> Floats | None:
    """From the last stage's first tensor-parallel rank to the leader, and to nobody else."""
    if layout.is_replica_leader and layout.is_last_stage:
        assert logp is not None, "the last stage scores"
        return logp.numpy()
    if layout.is_replica_leader:
        buffer = torch.empty(size, dtype=torch.float32)
        dist.recv(buffer, src=layout.last_stage_rank, group=layout.replica_group)
        return buffer.numpy()
    if layout.is_last_stage and layout.tp_rank == 0:
        assert logp is not None, "the last stage scores"
        dist.send(logp, dst=layout.leader_rank, group=layout.replica_group)
    return None
