"""Moves samples between replicas, so that each has equal work, and from a replica's leader to its other ranks.

All messages use CPU groups and safetensors bytes. Every leader learns the cost of every sample; the samples are sent
only to the ranks that need them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.bins import dealt_bins
from megatron_dypo.batching.wire import dump_samples, load_samples, without_routes
from megatron_dypo.parallel.collectives import gather_objects
from megatron_dypo.rollout.routes import allocate
from megatron_dypo.types import Routes, Sample


def num_tokens(sample: Sample) -> float:
    """Return the work of a sample, ignoring attention: its number of tokens."""
    return float(len(sample.tokens))


def balance(
    samples: Sequence[Sample], leaders: dist.ProcessGroup, cost: Callable[[Sample], float] = num_tokens
) -> list[Sample]:
    """Give each replica an equal share of the work. Every leader calls it with the samples that it holds.

    Every leader computes the same assignment from the costs. The result is ordered by (order, member), so it does not
    depend on which replica held a sample before.
    """
    if leaders.size() == 1:
        return sorted(samples, key=_key)
    costs = gather_objects([(*_key(s), cost(s)) for s in samples], leaders)
    owner = owners(itertools.chain.from_iterable(costs), leaders.size())
    outgoing: list[list[Sample]] = [[] for _ in range(leaders.size())]
    for sample in samples:
        outgoing[owner[_key(sample)]].append(sample)
    received = _all_to_all([dump_samples([without_routes(s) for s in part]) for part in outgoing], leaders)
    routes = exchange_routes(outgoing, leaders)
    found = (
        replace(sample, routes=known)
        for part, of_part in zip(received, routes, strict=True)
        for sample, known in zip(load_samples(part), of_part, strict=True)
    )
    return sorted(found, key=_key)


def exchange_routes(outgoing: Sequence[Sequence[Sample]], leaders: dist.ProcessGroup) -> list[list[Routes | None]]:
    """Send the routes of ``outgoing[r]`` to leader r; return those of the samples that came from each leader.

    They are the largest part of samples, so they go one by one, between two leaders at a time.
    """
    size, rank = leaders.size(), leaders.rank()
    shapes = [[None if s.routes is None else (s.routes.shape, s.routes.dtype.str) for s in part] for part in outgoing]
    incoming = [json.loads(text) for text in _all_to_all([json.dumps(part).encode() for part in shapes], leaders)]
    received: list[list[Routes | None]] = [[None] * len(part) for part in incoming]
    for step in range(size):
        target, source = (rank + step) % size, (rank - step) % size
        sent = [s.routes for s in outgoing[target] if s.routes is not None]
        places = [index for index, shape in enumerate(incoming[source]) if shape is not None]
        arrays = sent if step == 0 else _swap(sent, [incoming[source][i] for i in places], target, source, leaders)
        for index, array in zip(places, arrays, strict=True):
            received[source][index] = array
    return received


def _swap(
    sent: Sequence[Routes], shapes: Sequence[Any], target: int, source: int, leaders: dist.ProcessGroup
) -> list[Routes]:
    """Send arrays to one leader while those of these shapes come from another."""
    arrays = allocate([shape for shape, _ in shapes], np.dtype(shapes[0][1])) if shapes else []
    for out, into in itertools.zip_longest(sent, arrays):
        works = []
        if out is not None:
            works.append(
                dist.isend(bytes_of(np.require(out, requirements=["C", "W"])), group=leaders, group_dst=target)
            )
        if into is not None:
            works.append(dist.irecv(bytes_of(into), group=leaders, group_src=source))
        for work in works:
            assert work is not None, "this rank is in the group"
            work.wait()
    return arrays


def bytes_of(array: Routes) -> torch.Tensor:
    """Return the memory of an array, whose type torch may not have, as a tensor of bytes for a message."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def owners(work: Iterable[tuple[int, int, float]], replicas: int) -> dict[tuple[int, int], int]:
    """Return (order, member) → replica, given (order, member, cost) of all samples in any order.

    Replicas get roughly equal costs, not equal numbers of samples.
    """
    listing = sorted(work)
    bin_of = dealt_bins(np.array([cost for *_, cost in listing], np.float64), replicas).tolist()
    return {(order, member): replica for (order, member, _), replica in zip(listing, bin_of, strict=True)}


def broadcast_samples(samples: Sequence[Sample] | None, replica: dist.ProcessGroup) -> list[Sample]:
    """Return the samples of the leader (rank 0 of ``replica``) on every rank of the replica. Other ranks pass None.

    Routes stay on the leader, from where each rank gets the part that it needs once the samples are packed.
    """
    if replica.size() == 1:
        assert samples is not None, "a replica of one rank is its own leader"
        return list(samples)
    payload = dump_samples([without_routes(sample) for sample in samples]) if samples is not None else b""
    size = torch.tensor([len(payload)])
    dist.broadcast(size, group_src=0, group=replica)
    buffer = _as_tensor(payload) if samples is not None else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, group_src=0, group=replica)
    return list(samples) if samples is not None else load_samples(buffer.numpy().tobytes())


def _key(sample: Sample) -> tuple[int, int]:
    return sample.order, sample.member


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _all_to_all(outgoing: Sequence[bytes], group: dist.ProcessGroup) -> list[bytes]:
    sent = torch.tensor([len(part) for part in outgoing])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    buffer = torch.empty(int(received.sum()), dtype=torch.uint8)
    dist.all_to_all_single(buffer, _as_tensor(b"".join(outgoing)), received.tolist(), sent.tolist(), group=group)
    return [part.numpy().tobytes() for part in buffer.split(received.tolist())]
