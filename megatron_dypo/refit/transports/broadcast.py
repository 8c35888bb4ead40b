"""The broadcast transport, SGLang's distributed update: HF tensors in buckets, broadcast to stock servers.

The leader of each pipeline stage forms a group with all servers, as its rank 0. So nothing is gathered over stages.
Each other rank that owns experts of the stage (the first of the ranks that an expert is split over) also forms a group.
So nothing is gathered over owners. These ranks take turns, also in forming the groups: a server handles such calls one
after the other, and two half-formed groups on two servers would wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from megatron_dypo.models.gather import exhausted
from megatron_dypo.parallel import device
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.lockstep import Lockstep
from megatron_dypo.refit.source import Source, Turn
from megatron_dypo.refit.transports.base import Connection, Step
from megatron_dypo.refit.transports.buckets import fill_buckets
from megatron_dypo.refit.transports.update_group import UpdateGroup


class BroadcastConnection(Connection):
    """The connection of this rank, with the group in which it broadcasts, if it does."""

    def __init__(self, source: Source, group: UpdateGroup | None, bucket_bytes: int) -> None:
        """``group`` is None on ranks that only take part in gathers, or in nothing."""
        self._source = source
        self._group = group
        self._bucket_bytes = bucket_bytes

    @classmethod
    def open(
        cls,
        source: Source,
        control: SGLangControl | None,
        lockstep: Lockstep,
        bucket_bytes: int,
        deadline: Deadline,
    ) -> BroadcastConnection:
        """Form all groups. Collective over the world. Ranks that have a turn need ``control``.

        Raises:
            RefitError: on all ranks. All groups are closed then.
        """
        group = None
        with contextlib.ExitStack() as undo:
            for turn in source.turns:
                form = None
                if control is not None and turn == source.own_turn:
                    form = functools.partial(UpdateGroup.form, control, device.backend(), deadline)
                formed = lockstep.run(form)
                if formed is not None:
                    undo.callback(formed.abandon)
                    group = formed
            undo.pop_all()
        return cls(source, group, bucket_bytes)

    def steps(self, version: int, deadline: Deadline) -> Iterator[Step]:
        for turn in self._source.turns:
            yield functools.partial(self._stream, turn, deadline) if self._source.joins(turn) else None

    def abort(self) -> None:
        if self._group is not None:
            self._group.abandon()

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()

    def _stream(self, turn: Turn, deadline: Deadline) -> int:
        """Send the tensors of one turn; return the bytes sent. All ranks that join the turn call it."""
        with exhausted(self._source.tensors(turn)) as tensors:
            if self._group is None:
                return 0
            num_bytes = 0
            for bucket in fill_buckets(tensors, self._bucket_bytes):
                self._group.send(bucket, deadline)
                num_bytes += bucket.payload.numel()
            return num_bytes
