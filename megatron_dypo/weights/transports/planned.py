"""Weights shard to shard: each rank sends to each rank of each server exactly the slices that this one needs, once.

The servers are reached by :mod:`megatron_dypo.weights.receiver`, which SGLang loads. What each push tells them is a
:class:`ControlMessage`; the links, and a store on which both sides meet, stay open between pushes.
"""

from __future__ import annotations

import datetime
import functools
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dypo.parallel import device
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.weights.checksums import Verify
from megatron_dypo.weights.control_message import ControlMessage, PlanInputs, to_payload
from megatron_dypo.weights.deadline import Deadline
from megatron_dypo.weights.plan import EngineLayout, RefitPlan, SourceLayout, Transfer
from megatron_dypo.weights.quantized_names import Quantization
from megatron_dypo.weights.receiver import GO, inventory_key
from megatron_dypo.weights.sglang_control import ServerError, SGLangControl
from megatron_dypo.weights.slices import ShardSlices, SliceSource
from megatron_dypo.weights.transports.answers import Engines
from megatron_dypo.weights.transports.base import Lockstep, Source, Transport
from megatron_dypo.weights.transports.in_threads import run_all
from megatron_dypo.weights.transports.links import DEPTH, LinkError, Sender
from megatron_dypo.weights.transports.local import LocalSender
from megatron_dypo.weights.transports.messages import Message, cut
from megatron_dypo.weights.transports.p2p import GroupSender
from megatron_dypo.weights.transports.sending import LinkStart
from megatron_dypo.weights.transports.update_group import address_towards

CONNECTORS: dict[str, type[GroupSender] | type[LocalSender]] = {"p2p": GroupSender, "local": LocalSender}

_SMALLEST_SLOT = 2**20
_LARGEST_SLOT = 16 * 2**20
"""Longer messages gain nothing."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What every trainer rank has to know of a new connection."""

    urls: tuple[str, ...]
    plan: PlanInputs
    store_host: str
    store_port: int
    connection: str


class PlannedTransport(Transport):
    """See the module's docstring. ``control`` is None on all ranks but the leader."""

    def __init__(
        self,
        source: Source,
        control: SGLangControl | None,
        lockstep: Lockstep,
        *,
        kind: Literal["p2p", "local"],
        bucket_bytes: int,
        verify: Verify,
        quantization: Quantization,
    ) -> None:
        """``bucket_bytes``: limit of all staging buffers of a rank together."""
        self._source = source
        self._control = control if source.layout.is_global_leader else None
        self._lockstep = lockstep
        self._kind = kind
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._quantization = quantization
        self._connection: _Connection | None = None

    def send(self, version: int, deadline: Deadline) -> int:
        if self._connection is None:
            meet = functools.partial(self._meet, deadline) if self._control is not None else None
            meeting = self._lockstep.gather(self._lockstep.run(meet))[0]
            self._connection = self._lockstep.run(functools.partial(self._connect, meeting, deadline))
        ...
