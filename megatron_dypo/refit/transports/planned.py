"""Weights shard to shard: each rank sends to each rank of each server exactly the slices that this one needs, once.

The servers are reached by :mod:`megatron_dypo.refit.receiver`, which SGLang loads. What a refit tells them is a
:class:`ControlMessage`; the links, and a store on which both sides meet, stay open between refits.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.refit.checksums import Verify
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.control_message import ControlMessage, PlanInputs
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.plan import RefitPlan, SourceLayout
from megatron_dypo.refit.receiver import GO
from megatron_dypo.refit.shard_quantizer import ShardQuantizer
from megatron_dypo.refit.slices import ShardSlices, SliceSource
from megatron_dypo.refit.transports.base import Lockstep, Source, Transport
from megatron_dypo.refit.transports.in_threads import let_go
from megatron_dypo.refit.transports.links import DEPTH
from megatron_dypo.refit.transports.server_ranks import ServerRanks, server_mesh
from megatron_dypo.refit.transports.sources import SourceRank
from megatron_dypo.refit.transports.update_group import address_towards

_SMALLEST_SLOT, _LARGEST_SLOT = 2**20, 16 * 2**20
"""Bytes of one staging buffer; larger ones gain nothing."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What every trainer rank has to know of a new connection."""

    urls: tuple[str, ...]
    message: ControlMessage
    """To the first rank of the first server; the others are told the same but for their place."""


class PlannedTransport(Transport):
    """See the module's docstring. ``control`` is None on ranks that lead nothing."""

    def __init__(
        self,
        source: Source,
        control: SGLangControl | None,
        lockstep: Lockstep,
        *,
        kind: Literal["p2p", "local"],
        bucket_bytes: int,
        verify: Verify,
        quantization: Quantization = "none",
    ) -> None:
        """``bucket_bytes``: limit of all staging buffers of a rank together."""
        self._source = source
        self._control = control if source.layout.is_global_leader else None
        self._lockstep = lockstep
        self._kind = kind
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._quantization = quantization
        self._meeting: Meeting | None = None
        self._store: dist.Store | None = None
        self._server_ranks: ServerRanks | None = None
        self._rank: SourceRank | None = None
        self._num_refits = 0

    def send(self, version: int, deadline: Deadline) -> int:
        try:
            num_bytes = self._send(version, deadline)
        except RuntimeError as error:
            let_go(error)
            raise
        self._num_refits += 1
        return num_bytes

    def reset(self) -> None:
        if self._rank is not None:
            self._rank.close()
        if self._server_ranks is not None:
            self._server_ranks.close()
        # With the last reference to the store go the receivers that still wait on it.
        self._meeting = self._store = self._server_ranks = self._rank = None
        self._num_refits = 0

    def close(self) -> None:
        self.reset()

    def _send(self, version: int, deadline: Deadline) -> int:
        leads = self._control is not None
        is_new = self._rank is None
        if is_new:
            met = self._lockstep.run(functools.partial(self._meet, deadline) if leads else None)
            self._meeting = self._lockstep.gather(met)[0]
        self._lockstep.run(functools.partial(self._announce, version, deadline, is_new) if leads else None)
        if is_new:
            self._lockstep.run(functools.partial(self._prepare, deadline))
        return self._lockstep.run(functools.partial(self._transfer, version, deadline, is_new)) or 0

    def _meet(self, deadline: Deadline) -> Meeting:
        """Ask the servers for their layouts, and open a store for them."""
        assert self._control is not None
        servers = tuple(server_mesh(info) for info in self._control.describe(deadline))
        inputs = PlanInputs(
            arch=self._source.arch,
            source=source_layout(self._source.layout),
            servers=servers,
            quantization=self._quantization,
            element_size=next(iter(self._source.named_params()))[1].element_size(),
        )
        plan = inputs.make_plan()
        host = address_towards(self._control.urls)
        timeout = datetime.timedelta(seconds=deadline.seconds)
        store = dist.TCPStore(host, 0, None, True, timeout=timeout, wait_for_workers=False)
        self._store, self._server_ranks = store, ServerRanks(self._control, store, plan)
        message = ControlMessage(
            plan=inputs,
            server=0,
            server_rank=0,
            transport=self._kind,
            store_host=host,
            store_port=store.port,
            connection=uuid.uuid4().hex,
            is_new=True,
            slot_bytes=slot_bytes(plan, self._bucket_bytes),
            refit=0,
            version=0,
            verify=self._verify,
            timeout_s=deadline.seconds,
        )
        return Meeting(urls=self._control.urls, message=message)

    def _announce(self, version: int, deadline: Deadline, is_new: bool) -> None:
        """Tell the servers; of a new connection also hear, and check, what they hold."""
        assert self._meeting is not None
        assert self._server_ranks is not None
        message = dataclasses.replace(
            self._meeting.message,
            is_new=is_new,
            refit=self._num_refits,
            version=version,
            timeout_s=deadline.remaining(),
        )
        self._server_ranks.start(message, deadline)
        if is_new:
            self._server_ranks.check_inventories(self._num_refits, deadline)

    def _prepare(self, deadline: Deadline) -> None:
        """Compute this rank's part of the plan."""
        assert self._meeting is not None
        message = self._meeting.message
        if self._store is None:
            timeout = datetime.timedelta(seconds=deadline.seconds)
            self._store = dist.TCPStore(message.store_host, message.store_port, None, False, timeout=timeout)
        plan, rank = message.plan.make_plan(), self._source.layout.rank
        self._rank = SourceRank(plan, rank, self._store, self._meeting.urls, message.slot_bytes)

    def _transfer(self, version: int, deadline: Deadline, is_new: bool) -> int:
        """Send this rank's part; the leader then hears from all servers."""
        assert self._rank is not None
        assert self._store is not None
        if is_new:
            if self._server_ranks is not None:
                self._store.set(GO, "")
            self._rank.connect(self._kind, deadline)
        num_bytes = self._rank.send(self._slices(), version, self._verify, deadline)
        if self._server_ranks is not None:
            self._server_ranks.collect(self._num_refits)
        return num_bytes

    def _slices(self) -> SliceSource:
        """Collective over tensor-parallel groups where weights are quantised."""
        source = self._source
        if self._quantization == "none":
            return ShardSlices(source.named_params(), source.arch)
        return ShardQuantizer(source.named_params(), source.arch, source.layout, self._quantization)


def source_layout(layout: Layout) -> SourceLayout:
    """The trainer's mesh, as plans count it."""
    return SourceLayout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        data=layout.data,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
    )


def slot_bytes(plan: RefitPlan, bucket_bytes: int) -> int:
    """Size of one staging buffer, such that those of all links of any rank make one bucket."""
    links: Counter[tuple[str, ...] | tuple[str, int, int]] = Counter()
    for source, server, server_rank in plan.link_bytes():
        links["source", source, 0] += 1
        links["server_rank", server, server_rank] += 1
    share = bucket_bytes // (DEPTH * max(links.values()))
    return min(max(share, _SMALLEST_SLOT), _LARGEST_SLOT) // 4096 * 4096
