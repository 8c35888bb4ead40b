"""The experts that the routers of all ranks chose in a pass, brought to the leader (R2 of
:mod:`megatron_dypo.mcore.routing_replay`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

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
        for index, microbatch in enumerate(whole):
            own = self._own(index)
            for share in replay.shares:
                if share.parts == 1 and share.rank not in self._first_of_tensor:
                    continue  # without sequence parallelism it saw the same tokens as another rank
                if replay.layout.is_replica_leader:
                    part = own if share.rank == replay.layout.rank else self._received(microbatch, share)
                    put_routes(self.routes, part, microbatch, share, replay.layout.context)
                elif share.rank == replay.layout.rank:
                    buffer = torch.from_numpy(own.view(np.uint8).reshape(-1))
                    dist.send(buffer, dst=replay.layout.leader_rank, group=replay.layout.replica_group)

    @property
    def _first_of_tensor(self) -> set[int]:
        """Return the ranks that are first to hold their tokens and layers."""
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        for share in self._replay.shares:
            first.setdefault((share.cp_rank, share.layers), share.rank)
        return set(first.values())

    def _own(self, index: int) -> Routes:
        slots, share = self._replay.slots, self._replay.own_share
        assert [slot.column for slot in slots] == list(range(len(share.layers))), "one slot a layer, in their order"
        recorded = [slot.record[index] for slot in slots if slot.record is not None]
        shape = self._replay.shape
        if not recorded:
            return np.zeros((0, 0, shape.per_token), shape.dtype)
        return torch.stack(recorded, dim=1).cpu().numpy().astype(shape.dtype)

    def _received(self, microbatch: Microbatch, share: Share) -> Routes:
        replay = self._replay
        routes = np.empty(share.shape(microbatch, replay.layout.context, replay.shape.per_token), replay.shape.dtype)
        dist.recv(
            torch.from_numpy(routes.view(np.uint8).reshape(-1)), src=share.rank, group=replay.layout.replica_group
        )
        return routes
