"""Log-probs of whole sequences under the current weights: packed, forward only, answered on the replica's leader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.pack import alignment, num_microbatches, pack, plan_microbatches, row_length
from megatron_dypo.mcore.forward_step import logprob_pass
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.types import Floats, Sample


def round_up_microbatches(count: int, layout: Layout) -> int:
    """The interleaved schedule takes microbatches in groups of the pipeline size."""
    step = layout.pipeline if layout.virtual_pipeline > 1 else 1
    return -(-max(count, 1) // step) * step


def sequence_logprobs(
    chunks: Sequence[Any], samples: Sequence[Sample], *, layout: Layout, budget: int, row_multiple: int = 1
) -> list[Floats] | None:
    """log π of each sample's response tokens; collective over the replica, every rank passes the same samples.

    Replicas that share out experts run as many forward passes as the one with the most: then it is collective over all.

    Args:
        budget: tokens in one packed row.
        row_multiple: ``BatchingConfig.row_multiple``.

    Returns:
        On the replica's leader one [R] array for each sample, in order; None on the other ranks.
    """
    lengths = [len(sample.tokens) for sample in samples]
    count = num_microbatches(lengths, budget=budget)
    if layout.expert > 1:
        count = _most(count)
    if not count:
        return [] if layout.is_replica_leader else None
    bins = plan_microbatches(lengths, budget=budget, count=round_up_microbatches(count, layout))
    multiple = alignment(layout.tensor, layout.context, row_multiple)
    rows = [pack(samples, members, row_length(lengths, [members], multiple)) for members in bins]
    set_training(chunks, False)
    parts = logprob_pass(chunks, rows)
    set_training(chunks, True)
    flat = _to_leader(torch.cat(parts) if parts else None, sum(s.num_response_tokens for s in samples), layout)
    if flat is None or not samples:
        return None if flat is None else []
    order = [i for members in bins for i in members]
    pieces = np.split(flat, np.cumsum([samples[i].num_response_tokens for i in order])[:-1])
    by_sample = dict(zip(order, pieces, strict=True))
    return [by_sample[i] for i in range(len(samples))]


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
