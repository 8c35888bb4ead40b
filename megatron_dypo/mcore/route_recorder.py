"""The experts that the routers of all ranks chose in a pass, brought to the leader (R2 of
:mod:`megatron_dypo.mcore.routing_replay`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.exchange import bytes_of
from megatron_dypo.batching.routes import Share, put_routes
from megatron_dypo.mcore.routing_replay import RoutingReplay
from megatron_dypo.types import Microbatch, Routes, Sample


class RouteRecorder:
    """Records the experts that the routers choose in one forward-only pass over a replica's samples."""

    def __init__(self, replay: RoutingReplay) -> None:
        self._replay = replay
        self.routes: list[Routes] = []
        """[L, layers, k] of each sample, in order; on the leader alone."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record in the block."""
        for slot in self._replay.slots:
            slot.record = []
        try:
            yield
        finally:
            for slot in self._replay.slots:
                slot.record = None

    def collect(self, whole: Sequence[Microbatch], samples: Sequence[Sample]) -> None:
        """Bring what was recorded to the leader; call it inside of :meth:`recording`. Collective over the replica.

        Args:
            whole: the packed microbatches of the pass, the same on every rank.
            samples: those that were packed.
        """
        replay, shape = self._replay, self._replay.shape
        if replay.layout.is_replica_leader:
            sizes = ((len(sample.tokens), shape.num_layers, shape.per_token) for sample in samples)
            self.routes = [np.full(size, shape.unknown, shape.dtype) for size in sizes]
        shares = self._shares()
        for index, microbatch in enumerate(whole):
            for share in shares:
                is_own = share.rank == replay.layout.rank
                if replay.layout.is_replica_leader:
                    part = self._own(index) if is_own else replay.receive(microbatch, share, share.rank)
                    put_routes(self.routes, part, microbatch, share, replay.layout.context)
                elif is_own:
                    routes = bytes_of(self._own(index))
                    dist.send(routes, dst=replay.layout.leader_rank, group=replay.layout.replica_group)

    def _shares(self) -> list[Share]:
        """Return the shares that together are the whole: a stage may have no experts, and without sequence parallelism
        several ranks see the same tokens."""
        first: dict[tuple[int, int, tuple[int, ...]], Share] = {}
        for share in self._replay.shares:
            if share.layers:
                first.setdefault((share.cp_rank, share.part, share.layers), share)
        return list(first.values())

    def _own(self, index: int) -> Routes:
        """Return this rank's part of the microbatch with this index."""
        recorded = [slot.record[index] for slot in self._replay.slots if slot.record is not None]
        return torch.stack(recorded, dim=1).cpu().numpy().astype(self._replay.shape.dtype)
