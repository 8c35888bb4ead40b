"""Links over torch.distributed: one process group for each engine, of the sources that send to it and its own ranks.

The groups stand outside torch's default group, on a store of their own, and nobody else sends in them. Every engine has
its own, so that the loss of one is no error on the links to another. Ranks in a group: the sources in ascending order,
then the engine's ranks.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.parallel import device
from megatron_dypo.weights.deadline import Deadline
from megatron_dypo.weights.transports.links import DEPTH, Incoming, LinkError, Outgoing, Receiver, Sender


class GroupSender(Sender):
    """A source's end: a group for each engine that it sends to."""

    def __init__(self, groups: Mapping[int, Any], sources: Mapping[int, Sequence[int]], slot_bytes: int) -> None:
        self._groups = dict(groups)
        self._sources = sources
        self._slot_bytes = slot_bytes

    @classmethod
    def connect(
        cls,
        store: dist.Store,
        rank: int,
        sources: Mapping[int, Sequence[int]],
        tensor_parallel: Mapping[int, int],
        slot_bytes: int,
        deadline: Deadline,
    ) -> GroupSender:
        """Join the groups of all engines that ``rank`` sends to: ``sources`` and sizes by engine."""
        # Everybody in the same order: two half-made groups cannot wait for each other.
        groups = {
            engine: _join(store, engine, senders.index(rank), len(senders) + tensor_parallel[engine], deadline)
            for engine, senders in sorted(sources.items())
        }
        return cls(groups, sources, slot_bytes)

    def outgoing(self, engine: int, target: int, deadline: Deadline) -> Outgoing:
        return _GroupOutgoing(self._groups[engine], len(self._sources[engine]) + target, self._slot_bytes, deadline)

    def close(self) -> None:
        self._groups.clear()  # sockets close with the last reference


class GroupReceiver(Receiver):
    """A target's end: its engine's group."""

    def __init__(self, group: Any, sources: Sequence[int], slot_bytes: int) -> None:
        self._group = group
        self._sources = sources
        self._slot_bytes = slot_bytes

    @classmethod
    def connect(
        cls,
        store: dist.Store,
        engine: int,
        target: int,
        sources: Sequence[int],
        tensor_parallel: int,
        slot_bytes: int,
        deadline: Deadline,
    ) -> GroupReceiver:
        """Join the engine's group as rank ``target`` of the engine."""
        size = len(sources) + tensor_parallel
        return cls(_join(store, engine, len(sources) + target, size, deadline), sources, slot_bytes)

    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        return _GroupIncoming(self._group, self._sources.index(source), self._slot_bytes, deadline)

    def close(self) -> None:
        self._group = None


def _join(store: dist.Store, engine: int, rank: int, size: int, deadline: Deadline) -> Any:
    try:
        return device.separate_group(dist.PrefixStore(f"engine-{engine}", store), rank, size, _timeout(deadline))
    except RuntimeError as error:
        raise LinkError(f"the group of engine {engine} was not made: {error}") from error


class _GroupOutgoing(Outgoing):
    def __init__(self, group: Any, peer: int, slot_bytes: int, deadline: Deadline) -> None:
        self._group = group
        self._peer = peer
        self._slot_bytes = slot_bytes
        self._deadline = deadline
        self._slots: list[Tensor] = []
        self._next_slot = 0
        # Tensors are kept with their work: the group does not keep them alive.
        self._pending: deque[tuple[Any, Tensor]] = deque()

    def stage(self, num_bytes: int) -> Tensor:
        """With less than DEPTH messages under way, the slot of DEPTH posts ago is free."""
        self._wait_below(DEPTH)
        if len(self._slots) < DEPTH:
            self._slots.append(torch.empty(self._slot_bytes, dtype=torch.uint8, device=device.device()))
        slot = self._slots[self._next_slot % len(self._slots)]
        self._next_slot += 1
        return _of_size(slot, num_bytes)

    def post(self, payload: Tensor) -> None:
        self._wait_below(DEPTH)
        self._pending.append((_checked(lambda: self._group.send([payload], self._peer, 0)), payload))

    def drain(self) -> None:
        self._wait_below(1)
        device.synchronize()

    def _wait_below(self, limit: int) -> None:
        while len(self._pending) >= limit:
            work, _ = self._pending.popleft()
            _checked(lambda work=work: work.wait(_timeout(self._deadline)))


class _GroupIncoming(Incoming):
    def __init__(self, group: Any, peer: int, slot_bytes: int, deadline: Deadline) -> None:
        self._group = group
        self._peer = peer
        self._slot_bytes = slot_bytes
        self._deadline = deadline
        self._free: list[Tensor] = []
        self._num_slots = 0
        self._pending: deque[tuple[Any, Tensor, Tensor | None]] = deque()
        self._taken: Tensor | None = None

    def expect(self, num_bytes: int, into: Tensor | None) -> None:
        slot = None
        if into is None:
            if not self._free:
                assert self._num_slots < DEPTH, "more messages expected than there are buffers"
                self._free.append(torch.empty(self._slot_bytes, dtype=torch.uint8, device=device.device()))
                self._num_slots += 1
            slot = self._free.pop()
            into = _of_size(slot, num_bytes)
        buffer = into
        self._pending.append((_checked(lambda: self._group.recv([buffer], self._peer, 0)), buffer, slot))

    def take(self) -> Tensor:
        work, buffer, self._taken = self._pending.popleft()
        _checked(lambda: work.wait(_timeout(self._deadline)))
        return buffer

    def release(self) -> None:
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None


def _of_size(slot: Tensor, num_bytes: int) -> Tensor:
    """A message may be a row longer than the limit, where one row is longer."""
    return slot[:num_bytes] if num_bytes <= slot.numel() else slot.new_empty(num_bytes)


def _checked(call: Any) -> Any:
    try:
        return call()
    except RuntimeError as error:
        raise LinkError(str(error)) from error


def _timeout(deadline: Deadline) -> datetime.timedelta:
    try:
        return datetime.timedelta(seconds=deadline.remaining())
    except TimeoutError as error:
        raise LinkError(str(error)) from error
