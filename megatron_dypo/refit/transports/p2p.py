"""Links between GPUs, over torch.distributed: one process group per server, of its own ranks and those that send to it.

The groups are separate from torch's default group, with their own store, and carry only these messages. Every server
has its own group, so that the loss of one server causes no error on the links to another. Ranks in a group: the trainer
ranks in ascending order, then the server's ranks.

NCCL makes a communicator for two ranks at their first message, and waits for kernels that run then. So ranks greet
each other when they connect: one thread, one pair after the other, every rank in the order of its peers' numbers. The
pair of the lowest numbers that is left can always go on.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.mcore.compat.groups import abort, separate_group
from megatron_dypo.parallel import device, streams
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.links import DEPTH, Incoming, LinkError, Outgoing, Receiver, Sender, ServerLinks

_CTAS = 64
"""Thread blocks (CTAs) of a GPU that wait for messages at once, over all links of a rank. A GPU runs about 130. If each
link took NCCL's default, those of a few links would fill it, and the kernels that they wait for could not start."""


class GroupSender(Sender):
    """A trainer rank's ends of its links to one server, in the group of that server."""

    def __init__(self, group: Any, links: ServerLinks) -> None:
        self._group = group
        self._links = links
        self._ends: dict[int, GroupOutgoing] = {}

    @classmethod
    def connect(cls, links: ServerLinks, rank: int, deadline: Deadline) -> GroupSender:
        group = _join(links, links.sources.index(rank), deadline)
        for server_rank in links.peers:
            _exchange(group.send, len(links.sources) + server_rank, deadline)
        return cls(group, links)

    def outgoing(self, server_rank: int, deadline: Deadline) -> Outgoing:
        peer = len(self._links.sources) + server_rank
        self._ends[server_rank] = GroupOutgoing(self._group, peer, self._links.slot_bytes, deadline)
        return self._ends[server_rank]

    def close(self) -> None:
        abort(self._group)
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
        group = _join(links, len(links.sources) + server_rank, deadline)
        for source in links.peers:
            _exchange(group.recv, links.sources.index(source), deadline)
        return cls(group, links)

    def incoming(self, source: int, deadline: Deadline) -> Incoming:
        peer = self._links.sources.index(source)
        self._ends[source] = GroupIncoming(self._group, peer, self._links.slot_bytes, deadline)
        return self._ends[source]

    def close(self) -> None:
        abort(self._group)
        self._group = None
        for end in self._ends.values():
            end.abandon()


def _join(links: ServerLinks, rank: int, deadline: Deadline) -> Any:
    store = dist.PrefixStore(f"server-{links.server}", links.store)
    size = len(links.sources) + links.num_server_ranks
    with _as_link_errors():
        return separate_group(store, rank, size, _timeout(deadline), ctas=_CTAS // links.most_of_a_rank)


def _exchange(send_or_receive: Callable[[list[Tensor], int, int], Any], peer: int, deadline: Deadline) -> None:
    greeting = torch.zeros(1, dtype=torch.uint8, device=device.device())
    with _as_link_errors():
        streams.finish(send_or_receive([greeting], peer, 0), deadline.remaining())


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
        device.synchronize_stream()

    def abandon(self) -> None:
        """Drop the group and the work under way, which both hold its sockets open."""
        self._group = None
        self._pending.clear()

    def _wait_below(self, limit: int) -> None:
        while len(self._pending) >= limit:
            work, _ = self._pending.popleft()
            with _as_link_errors():
                streams.finish(work, self._deadline.remaining())


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
            streams.finish(work, self._deadline.remaining())
        return buffer

    def abandon(self) -> None:
        """Drop the group and the work under way, which both hold its sockets open."""
        self._group = None
        self._pending.clear()

    def release(self) -> None:
        device.synchronize_stream()  # the buffer may be received into again, on another stream
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
