"""Log-probs of whole sequences under the current weights: packed, forward only, returned on the replica's leader."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.pack import (
    alignment,
    microbatch_length,
    num_microbatches,
    pack,
    padded_lengths,
    plan_microbatches,
    sequence_alignment,
)
from megatron_dypo.batching.zigzag import local_response_mask, shard
from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.mcore.forward_step import logprob_pass
from megatron_dypo.mcore.route_recorder import RouteRecorder
from megatron_dypo.mcore.routing_replay import RoutingReplay
from megatron_dypo.objective.streams import Stream
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Floats, Microbatch, Sample


def round_up_microbatches(count: int, layout: MeshRank) -> int:
    """Round ``count`` up to a number that the schedule accepts: an interleaved one needs multiples of ``pipeline``."""
    step = layout.pipeline if layout.virtual_pipeline > 1 else 1
    return -(-max(count, 1) // step) * step


def plan_update(samples: Sequence[Sample], costs: Sequence[float], layout: MeshRank, *, budget: int) -> list[list[int]]:
    """Plan an update's microbatches of roughly equal work. Every replica gets the same number. Collective.

    Args:
        costs: work of each sample.
        budget: tokens in one microbatch.
    """
    lengths = padded_lengths(samples, sequence_alignment(layout.context))
    count = round_up_microbatches(largest_count(num_microbatches(lengths, budget=budget, costs=costs)), layout)
    return plan_microbatches(lengths, budget=budget, count=count, costs=costs)


def pack_microbatches(
    samples: Sequence[Sample],
    bins: Sequence[Sequence[int]],
    layout: MeshRank,
    *,
    token_multiple: int,
    streams: Sequence[Stream],
) -> list[Microbatch]:
    """Pack the samples of each bin. Each microbatch is padded only to this layout's alignment.

    Args:
        token_multiple: ``Config.token_multiple``.
        streams: streams of the objective; () for a pass without a loss.
    """
    per_sequence = sequence_alignment(layout.context)
    lengths = padded_lengths(samples, per_sequence)
    multiple = alignment(layout.tensor, layout.context, token_multiple)
    return [
        pack(samples, members, microbatch_length(lengths, [members], multiple), per_sequence, streams)
        for members in bins
    ]


def own_parts(
    packed: Sequence[Microbatch], samples: Sequence[Sample], layout: MeshRank, replay: RoutingReplay | None
) -> list[Microbatch]:
    """Return this rank's part of each packed microbatch. Collective over the replica with ``replay``.

    Args:
        samples: those that were packed.
        replay: brings each rank the routes of its part; None: the routers choose.
    """
    parts = [shard(microbatch, layout.cp_rank, layout.context) for microbatch in packed]
    return parts if replay is None else replay.give(parts, packed, samples)


def pack_alone(
    samples: Sequence[Sample],
    layout: MeshRank,
    *,
    token_multiple: int,
    streams: Sequence[Stream],
    replay: RoutingReplay | None = None,
) -> list[Microbatch]:
    """Pack samples into one microbatch, with as many empty ones as the schedule needs; return this rank's part of each.

    The arguments are those of :func:`pack_microbatches` and :func:`own_parts`.
    """
    bins = [list(range(len(samples))), *([] for _ in range(round_up_microbatches(1, layout) - 1))]
    packed = pack_microbatches(samples, bins, layout, token_multiple=token_multiple, streams=streams)
    return own_parts(packed, samples, layout, replay)


def sequence_logprobs(
    chunks: Sequence[torch.nn.Module],
    samples: Sequence[Sample],
    *,
    layout: MeshRank,
    budget: int,
    token_multiple: int = 1,
    entropy: bool = False,
    by_group: bool = False,
    replay: RoutingReplay | None = None,
    recorder: RouteRecorder | None = None,
) -> list[Floats] | None:
    """Return log π of each sample's response tokens. Collective over the replica; every rank passes the same samples.

    If replicas share experts, all run as many forward passes as the one with the most microbatches. Then the function
    is collective over the world.

    Args:
        budget: tokens in one microbatch.
        token_multiple: ``Config.token_multiple``.
        entropy: return entropies in place of log-probs.
        by_group: put no two groups into one microbatch. Then the last bits of a sample's log-probs do not depend on the
            groups that are scored with it, and so not on the time at which each came.
        replay: replays the routes of the leader's samples; None: the routers choose.
        recorder: gets the experts that the routers choose.

    Returns:
        On the replica's leader one [R] array for each sample, in order; None on the other ranks.
    """
    bins = _plan_scoring(samples, layout, budget=budget, by_group=by_group)
    if not bins:
        return _nothing(layout)
    packed = pack_microbatches(samples, bins, layout, token_multiple=token_multiple, streams=())
    set_training(chunks, False)
    for chunk in chunks:
        unwrap(chunk).scores_entropy = entropy
    with contextlib.nullcontext() if recorder is None else recorder.recording():
        parts = logprob_pass(chunks, own_parts(packed, samples, layout, replay), entropy=entropy)
        if recorder is not None:
            recorder.collect(packed, samples)
    set_training(chunks, True)
    if not samples:
        return _nothing(layout)
    flat = _to_leader(torch.cat(parts) if parts else None, packed, layout)
    if flat is None:
        return None
    order = [i for members in bins for i in members]
    pieces = np.split(flat, np.cumsum([samples[i].num_response_tokens for i in order])[:-1])
    by_sample = dict(zip(order, pieces, strict=True))
    return [by_sample[i] for i in range(len(samples))]


def _plan_scoring(samples: Sequence[Sample], layout: MeshRank, *, budget: int, by_group: bool) -> list[list[int]]:
    """Return the indices of the samples of each microbatch; [] if no replica has any."""
    lengths = padded_lengths(samples, sequence_alignment(layout.context))
    indices = range(len(samples))
    parts = [list(indices)]
    if by_group:
        parts = [list(members) for _, members in itertools.groupby(indices, key=lambda i: samples[i].order)]
    counts = [num_microbatches([lengths[i] for i in part], budget=budget) for part in parts]
    count = sum(counts)
    if layout.shares_experts:
        count = largest_count(count)
    if not count:
        return []
    count = round_up_microbatches(count, layout)
    if not by_group:
        return plan_microbatches(lengths, budget=budget, count=count)
    bins = [
        [part[i] for i in members]
        for part, own in zip(parts, counts, strict=True)
        for members in plan_microbatches([lengths[i] for i in part], budget=budget, count=own)
    ]
    return [*bins, *([] for _ in range(count - len(bins)))]


def _nothing(layout: MeshRank) -> list[Floats] | None:
    return [] if layout.is_replica_leader else None


def largest_count(count: int) -> int:
    """Return the largest of all ranks' counts. Collective over the world."""
    most = torch.tensor([count], device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def set_training(chunks: Sequence[torch.nn.Module], mode: bool) -> None:
    """Put all model chunks into training mode, or into evaluation mode."""
    for chunk in chunks:
        chunk.train(mode)


def _to_leader(own: torch.Tensor | None, packed: Sequence[Microbatch], layout: MeshRank) -> Floats | None:
    """Send the log-probs of all response tokens to the leader, which returns them in the microbatches' order.

    The ranks of the last stage with tensor-parallel rank 0 send them, each its zig-zag part.
    """
    if not layout.is_replica_leader:
        if layout.rank in layout.scoring_ranks:
            assert own is not None, "the last stage scores"
            dist.send(own, dst=layout.leader_rank, group=layout.replica_group)
        return None
    flat = np.empty(sum(int(microbatch.response_T.sum()) for microbatch in packed), np.float32)
    for cp_rank, source in enumerate(layout.scoring_ranks):
        is_held = local_response_mask(packed, cp_rank, layout.context)
        if source == layout.rank:
            assert own is not None, "the last stage scores"
            part = own
        else:
            part = torch.empty(int(is_held.sum()), dtype=torch.float32)
            dist.recv(part, src=source, group=layout.replica_group)
        flat[is_held] = part.numpy()
    return flat
