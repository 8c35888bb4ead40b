"""Routing replay: routers that take the experts which another pass chose, and their own weights for them.

Rollout servers and the trainer compute the same router with other kernels, so that they choose other experts for some
tokens, and other experts give other log-probs. With replay the trainer takes the servers' choice (R3, arXiv 2510.11370,
section 3), or every update takes the choice of the pass that computed log π_old (R2). Only the choice is taken: the
routing weights are those of the trainer's own logits at the chosen experts, so that the router learns.

Megatron calls ``router_replay.get_replay_topk`` in place of its top-k (transformer/moe/moe_utils.py:705 of 0.16.1);
:class:`ReplayedRoutes` has that method. Megatron's own ``RouterReplay`` keeps one list for all models of a process, and
must be told before each recomputation. This one needs no word: a router that runs outside of a forward step is being
recomputed, in the order of the microbatches.

The load-balancing loss still counts the router's own choice, since that is what it must learn to balance.

Shape legend: T tokens on this rank's router, E experts, K experts of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.batching.exchange import bytes_of
from megatron_dypo.batching.routes import Share, cut_routes, has_routes
from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.mcore.moe_router import routers
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.parallel.collectives import gather_objects
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.types import Microbatch, Routes, Sample

_WINDOW = 8
"""Messages that a leader sends at the same time."""


class ReplayedRoutes:
    """The choice of experts of one router."""

    def __init__(self, column: int) -> None:
        self.column = column
        """Index of the router's layer in the routes of this rank."""
        self.replaced: Tensor | int = 0
        """Tokens for which the router would have chosen other experts, in forward steps so far; a tensor after the
        first."""
        self.replayed: Tensor | int = 0
        """Tokens whose choice was replayed."""
        self.record: list[Tensor] | None = None
        """The router's own choice in every forward step, [T, K] each; None: not recorded."""
        self._now: Tensor | None = None
        self._is_in_step = False
        self._to_recompute: deque[Tensor | None] = deque()

    def begin(self, routes_TLK: Tensor | None, *, is_recomputed: bool) -> None:
        """Begin a forward step. None: the router chooses."""
        self._now = None if routes_TLK is None else routes_TLK[:, self.column]
        self._is_in_step = True
        if is_recomputed:
            self._to_recompute.append(self._now)

    def end(self) -> None:
        """End the forward step."""
        self._now, self._is_in_step = None, False

    def clear(self) -> None:
        """Forget the microbatches of a pass."""
        self.end()
        self._to_recompute.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: [T, E] scores → [T, K] scores of the chosen, [T, K] their indices.

        Raises:
            RuntimeError: there are not as many routes as tokens.
        """
        assert default_compute_topk is not None, "Megatron passes its own choice"
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.record is not None:
            self.record.append(own)
        routes = self._now if self._is_in_step else self._recomputed()
        if routes is None:
            return own_scores, own
        if routes.shape != own.shape:
            raise RuntimeError(f"routes of shape {tuple(routes.shape)} for a choice of {tuple(own.shape)}")
        given = routes.to(own.dtype)
        ordered = given.sort(dim=-1).values
        is_unknown = _is_unknown(routes, ordered)
        if self._is_in_step:
            differs = (ordered != own.sort(dim=-1).values).any(dim=-1) & ~is_unknown
            self.replaced = self.replaced + differs.sum()
            self.replayed = self.replayed + (~is_unknown).sum()
        chosen = torch.where(is_unknown[:, None], own, given)
        return scores.gather(1, chosen), chosen

    def _recomputed(self) -> Tensor | None:
        if not self._to_recompute:
            raise RuntimeError("a router ran outside of a forward step, and no microbatch waits to be recomputed")
        return self._to_recompute.popleft()


def _is_unknown(routes: Tensor, ordered: Tensor) -> Tensor:
    """Return [T] whether a row is no choice: it is marked as unknown, or repeats an expert, as rows do that a server
    never wrote."""
    is_marked = routes[:, 0] == (torch.iinfo(torch.uint8).max if routes.dtype == torch.uint8 else -1)
    return is_marked | (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1)


@dataclass(frozen=True, kw_only=True)
class RoutingReplay:
    """The routes of a replica: the leader holds those of whole samples, and each rank gets its part of them."""

    shape: RouteShape
    layout: MeshRank
    shares: tuple[Share, ...]
    """The shares of the replica's ranks, in their order."""
    chunks: tuple[torch.nn.Module, ...]

    def give(
        self, parts: Sequence[Microbatch], whole: Sequence[Microbatch], samples: Sequence[Sample]
    ) -> list[Microbatch]:
        """Return ``parts`` with this rank's routes. Collective over the replica.

        Args:
            parts: this rank's parts of ``whole``.
            whole: the packed microbatches, the same on every rank.
            samples: those that were packed; the leader's have their routes.
        """
        flags = torch.tensor([has_routes(microbatch, samples) for microbatch in whole], dtype=torch.uint8)
        dist.broadcast(flags, src=self.layout.leader_rank, group=self.layout.replica_group)
        having: list[int] = flags.tolist()
        kept = self._exchange([one for one, has in zip(whole, having, strict=True) if has], samples)
        return [replace(part, routes=next(kept)) if has else part for part, has in zip(parts, having, strict=True)]

    def _exchange(self, whole: Sequence[Microbatch], samples: Sequence[Sample]) -> Iterator[Routes]:
        if self.layout.is_replica_leader:
            return iter(self._send(whole, samples))
        return iter([self.receive(microbatch, self.own_share, self.layout.leader_rank) for microbatch in whole])

    def _send(self, whole: Sequence[Microbatch], samples: Sequence[Sample]) -> list[Routes]:
        own: list[Routes] = []
        open_sends: deque[tuple[dist.Work, Tensor]] = deque()
        for microbatch in whole:
            for share in self.shares:
                routes = cut_routes(microbatch, samples, share, self.shape, self.layout.context)
                if share.rank == self.layout.rank:
                    own.append(routes)
                    continue
                buffer = bytes_of(routes)
                work = dist.isend(buffer, dst=share.rank, group=self.layout.replica_group)
                assert work is not None, "this rank is in the group"
                open_sends.append((work, buffer))
                if len(open_sends) > _WINDOW:
                    open_sends.popleft()[0].wait()
        for work, _ in open_sends:
            work.wait()
        return own

    def receive(self, microbatch: Microbatch, share: Share, source: int) -> Routes:
        """Receive the routes of a share of a whole microbatch from rank ``source`` of the replica."""
        routes = np.empty(share.shape(microbatch, self.layout.context, self.shape.per_token), self.shape.dtype)
        dist.recv(bytes_of(routes), src=source, group=self.layout.replica_group)
        return routes

    @property
    def slots(self) -> list[ReplayedRoutes]:
        """Return what the routers of this rank replay, in the order of its layers."""
        return [slot for chunk in self.chunks for slot in _slots(chunk)]

    @property
    def own_share(self) -> Share:
        """Return the share of this rank."""
        return next(share for share in self.shares if share.rank == self.layout.rank)

    def take_difference(self, name: str) -> dict[str, float]:
        """Return the share of tokens and layers for which the router would have chosen other experts, since the last
        call; {} if none were replayed. Collective over the world."""
        slots = self.slots
        counts = [float(sum(slot.replaced for slot in slots)), float(sum(slot.replayed for slot in slots))]
        total = torch.tensor(counts, dtype=torch.float64, device=device())
        if self.layout.tp_rank > 0 and self.shares[0].parts == 1:
            total.zero_()  # without sequence parallelism every tensor-parallel rank saw the same tokens
        dist.all_reduce(total)
        for slot in slots:
            slot.replaced = slot.replayed = 0
        replaced, replayed = total.tolist()
        return {name: replaced / replayed} if replayed else {}


def install(chunks: Sequence[torch.nn.Module], arch: Architecture, layout: MeshRank) -> RoutingReplay:
    """Let the routers of this rank replay routes. Collective over the replica."""
    config = unwrap(chunks[0]).config
    layers: list[int] = []
    for router in routers(chunks):
        router.router_replay = ReplayedRoutes(len(layers))
        layers.append(int(router.layer_number) - 1)
    own = Share(
        rank=layout.rank,
        cp_rank=layout.cp_rank,
        part=layout.tp_rank if config.sequence_parallel else 0,
        parts=layout.tensor if config.sequence_parallel else 1,
        layers=tuple(layers),
    )
    return RoutingReplay(
        shape=route_shape(arch),
        layout=layout,
        shares=tuple(gather_objects(own, layout.replica_group)),
        chunks=tuple(chunks),
    )


def route_shape(arch: Architecture) -> RouteShape:
    """Return the sizes of the routes of a model with experts."""
    assert arch.experts is not None, "the model has experts"
    return RouteShape(
        num_layers=arch.num_layers, per_token=arch.experts.per_token, num_experts=arch.experts.num_experts
    )


def slots_of(chunks: Sequence[torch.nn.Module]) -> Mapping[int, list[ReplayedRoutes]]:
    """Return ``id(chunk)`` → what its routers replay; empty lists without replay."""
    return {id(chunk): _slots(chunk) for chunk in chunks}


def forget_microbatches(slots: Mapping[int, Sequence[ReplayedRoutes]]) -> None:
    """Forget the microbatches of a pass that has ended: layers that are not recomputed did not take theirs."""
    for of_chunk in slots.values():
        for slot in of_chunk:
            slot.clear()


@contextmanager
def replayed(slots: Sequence[ReplayedRoutes], routes: Routes | None, *, is_recomputed: bool) -> Iterator[None]:
    """Run the block as the forward step of one microbatch with these routes; None: the routers choose.

    Args:
        is_recomputed: whether layers of this microbatch may run again in the backward pass.
    """
    on_device = None
    if slots and routes is not None:
        signed = routes.view(np.int16) if routes.dtype == np.uint16 else routes  # torch has few operations for uint16
        on_device = torch.from_numpy(signed).to(device())
    for slot in slots:
        slot.begin(on_device, is_recomputed=is_recomputed)
    try:
        yield
    finally:
        for slot in slots:
            slot.end()


def _slots(chunk: torch.nn.Module) -> list[ReplayedRoutes]:
    return [router.router_replay for router in routers([chunk]) if isinstance(router.router_replay, ReplayedRoutes)]
