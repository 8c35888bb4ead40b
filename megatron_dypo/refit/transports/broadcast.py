"""Weights through SGLang's distributed update: HF tensors, flattened into buckets, broadcast to a stock server.

Each pipeline stage's leader forms one group with all servers, of which it is rank 0, so that nothing is gathered over
stages; so does each further rank that owns experts of the stage (the first of those that an expert is split over), so that
nothing is gathered over owners. They take turns, in making the groups too: a server handles one such call after the other,
and two half-made groups on two servers would wait for each other.
"""

from __future__ import annotations

import functools

from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.base import Lockstep, Source, Transport
from megatron_dypo.refit.transports.buckets import fill_buckets
from megatron_dypo.refit.transports.update_group import UpdateGroup


class BroadcastTransport(Transport):
    """See the module's docstring. ``control`` is None on ranks that lead no stage."""

    def __init__(
        self, source: Source, control: SGLangControl | None, lockstep: Lockstep, *, backend: str, bucket_bytes: int
    ) -> None:
        self._source = source
        self._control = control
        self._lockstep = lockstep
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._group: UpdateGroup | None = None
        self._is_connected = False

    def send(self, version: int, deadline: Deadline) -> int:
        if not self._is_connected:
            for turn in self._source.turns:
                mine = turn == self._source.own_turn
                self._lockstep.run(functools.partial(self._connect, deadline) if mine else None)
            self._is_connected = True
        num_bytes = 0
        for turn in self._source.turns:
            joins = self._source.joins(turn)
            num_bytes += self._lockstep.run(functools.partial(self._stream, turn, deadline) if joins else None) or 0
        return num_bytes

    def reset(self) -> None:
        self._is_connected = False
        if self._group is not None:
            self._group.abandon()
            self._group = None

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None
        self._is_connected = False

    def _connect(self, deadline: Deadline) -> None:
        assert self._control is not None
        self._group = UpdateGroup.form(self._control, self._backend, deadline)

    def _stream(self, turn: tuple[int, int], deadline: Deadline) -> int:
        """Send the tensors of one turn; returns the bytes sent. Runs on all ranks that join the turn."""
        num_bytes = 0
        tensors = self._source.tensors(turn)
        try:
            for bucket in fill_buckets(tensors, self._bucket_bytes):
                assert self._group is not None
                self._group.send(bucket, deadline)
                num_bytes += bucket.payload.numel()
        finally:
            # After an error the other tensor-parallel ranks are still in their part of each gather: do ours.
            for _ in tensors:
                pass
        return num_bytes
