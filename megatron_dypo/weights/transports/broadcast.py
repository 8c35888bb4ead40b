"""Weights through SGLang's distributed update: HF tensors, flattened into buckets, broadcast to a stock server.

Each pipeline stage's leader forms one group with all servers, of which it is rank 0, so that nothing is gathered over
stages. Stages take turns, in making the groups too: a server handles one such call after the other, and two
half-made groups on two servers would wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_dypo.weights.sglang_control import Deadline, SGLangControl
from megatron_dypo.weights.transports.base import Lockstep, Source, Transport
from megatron_dypo.weights.transports.buckets import fill_buckets
from megatron_dypo.weights.transports.update_group import UpdateGroup


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
            self._take_turns(self._source.is_stage_leader, functools.partial(self._connect, deadline))
            self._is_connected = True
        return self._take_turns(self._source.is_sender, functools.partial(self._stream, deadline)) or 0

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

    def _take_turns(self, takes_part: bool, action: Callable[[], Any]) -> Any:
        result = None
        for stage in range(self._source.layout.pipeline):
            is_turn = takes_part and stage == self._source.layout.pp_rank
            answer = self._lockstep.run(action if is_turn else None)
            result = answer if is_turn else result
        return result

    def _connect(self, deadline: Deadline) -> None:
        assert self._control is not None
        self._group = UpdateGroup.form(self._control, self._backend, deadline)

    def _stream(self, deadline: Deadline) -> int:
        """Send this stage's tensors; returns the bytes sent. Runs on all tensor-parallel ranks of the stage."""
        num_bytes = 0
        tensors = self._source.tensors()
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
