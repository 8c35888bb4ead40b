"""Links over torch.distributed: one process group per server, of the trainer ranks that send to it and its own ranks.

The groups are separate from torch's default group, with their own store, and carry only these messages. Every server
has its own group, so that the loss of one server causes no error on the links to another. Ranks in a group: the trainer
ranks in ascending order, then the server's ranks.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.mcore.compat.groups import separate_group
from megatron_dypo.parallel import device
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.links import DEPTH, Incoming, LinkError, Outgoing, Receiver, Sender, ServerLinks


class GroupSender(Sender):
    """A trainer rank's ends of its links to one server, in the group of that server."""

    def __init__(self, group: Any, links: ServerLinks) -> None:
        self._group = group
        self._links = links
        self._ends: dict[int, GroupOutgoing] = {}

    @classmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> GroupSender:
        return cls(_join(links, links.sources.index(rank), deadline), links)

    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        peer = len(self._links.sources) + server_rank
        self._ends[server_rank] = GroupOutgoing(self._group, peer, self._links.slot_bytes, deadline)
        return self._ends[server_rank]

    def close(self) -> None:
        self._group = None  # the sockets close with the last reference
        for end in self._ends.values():
            end.abandon()


class GroupReceiver(Receiver):
    """A server rank's ends of all its links, in the group of its server."""

    def __init__(self, group: Any, links: ServerLinks) -> None:
        self._group = group
        self._links = links
        self._ends: dict[int, GroupIncoming] = {}

    @classmethod
    def connect(cls, links: ServerLinks, server_rank: int, deadline: Deadline) -> GroupReceiver:
        return cls(_join(links, len(links.sources) + server_rank, deadline), links)

    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        peer = self._links.sources.index(source)
        self._ends[source] = GroupIncoming(self._group, peer, self._links.slot_bytes, deadline)
        return self._ends[source]

    def close(self) -> None:
        self._group = None
        for end in self._ends.values():
            end.abandon()


def _join(links: ServerLinks, rank: int, deadline: Deadline) -> Any:
    store = dist.PrefixStore(f"server-{links.server}", links.store)
    with _as_link_errors():
        return separate_group(store, rank, len(links.sources) + links.num_server_ranks, _timeout(deadline))


class GroupOutgoing(Outgoing):
    """The sending end of one link over a group."""

    def __init__(self, group: Any, peer: int, slot_bytes: int, deadline: Deadline) -> None:
        self._group = group
        self._peer = peer
        self._slot_bytes = slot_bytes
        self._deadline = deadline
        self._slots: list[Tensor] = []
        self._next_slot = 0
        # Keep each tensor with its work, since the group does not keep it alive.
        self._pending: deque[tuple[Any, Tensor]] = deque()

    def stage(self, num_bytes: int) -> Tensor:
        """Return the slot that was used DEPTH posts ago; it is free when fewer than DEPTH messages are in flight."""
        self._wait_below(DEPTH)
        if len(self._slots) < DEPTH:
            self._slots.append(torch.empty(self._slot_bytes, dtype=torch.uint8, device=device.device()))
        slot = self._slots[self._next_slot % len(self._slots)]
        self._next_slot += 1
        return slot[:num_bytes]

    def post(self, payload: Tensor) -> None:
        self._wait_below(DEPTH)
        with _as_link_errors():
            self._pending.append((self._group.send([payload], self._peer, 0), payload))

    def drain(self) -> None:
        self._wait_below(1)
        device.synchronize()

    def abandon(self) -> None:
        """Drop the group and the work under way, which both hold its sockets open."""
        self._group = None
        self._pending.clear()

    def _wait_below(self, limit: int) -> None:
        while len(self._pending) >= limit:
            work, _ = self._pending.popleft()
            with _as_link_errors():
                work.wait(_timeout(self._deadline))


class GroupIncoming(Incoming):
    """The receiving end of one link over a group."""

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
            into = slot[:num_bytes]
        with _as_link_errors():
            self._pending.append((self._group.recv([into], self._peer, 0), into, slot))

    def take(self) -> Tensor:
        work, buffer, self._taken = self._pending.popleft()
        with _as_link_errors():
            work.wait(_timeout(self._deadline))
        return buffer

    def abandon(self) -> None:
        """Drop the group and the work under way, which both hold its sockets open."""
        self._group = None
        self._pending.clear()

    def release(self) -> None:
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None


@contextlib.contextmanager
def _as_link_errors() -> Iterator[None]:
    """Raise LinkError in place of the RuntimeError that torch.distributed raises for every failure of a connection."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        raise LinkError(str(error)) from error


def _timeout(deadline: Deadline) -> datetime.timedelta:
    return datetime.timedelta(seconds=deadline.remaining())
