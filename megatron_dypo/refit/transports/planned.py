"""The planned transports, ``p2p`` and ``local``: trainer ranks send each server rank exactly the slices that it needs.

SGLang loads :mod:`megatron_dypo.refit.receiver`, the servers' end. A :class:`ControlMessage` tells it of each refit.
The links, and a store on which both sides meet, stay open between refits.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import uuid
from collections.abc import Iterator
from typing import Literal

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.parallel.stores import ServedStore, reach_store
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.control_message import ControlMessage, PlanInputs
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.lockstep import Lockstep
from megatron_dypo.refit.shard_quantizer import ShardQuantizer
from megatron_dypo.refit.slices import ShardSlices, SliceSource
from megatron_dypo.refit.source import Source
from megatron_dypo.refit.transports.base import Connection, Step
from megatron_dypo.refit.transports.links import DEPTH
from megatron_dypo.refit.transports.lost_peers import LostServers
from megatron_dypo.refit.transports.reported_mesh import server_mesh
from megatron_dypo.refit.transports.server_ranks import Offer, ServerRanks
from megatron_dypo.refit.transports.trainer_rank import TrainerRank
from megatron_dypo.refit.transports.update_group import address_towards_all

_SMALLEST_SLOT, _LARGEST_SLOT = 2**20, 16 * 2**20
"""Smallest and largest size of one staging buffer in bytes; larger buffers are not faster."""


class PlannedConnection(Connection):
    """This rank's links to server ranks, and on the leader the calls that tell the servers of each refit."""

    def __init__(self, trainer_rank: TrainerRank, server_ranks: ServerRanks | None) -> None:
        """``server_ranks`` is None except on the global leader."""
        self._trainer_rank = trainer_rank
        self._server_ranks = server_ranks
        self._num_refits = 0

    @classmethod
    def open(
        cls,
        source: Source,
        control: SGLangControl | None,
        lockstep: Lockstep,
        kind: Literal["p2p", "local"],
        config: RefitConfig,
        deadline: Deadline,
    ) -> PlannedConnection:
        """Connect all ranks with all servers. Collective over the world. The global leader needs ``control``.

        Raises:
            RefitError: on all ranks. Nothing stays open then.
        """
        with contextlib.ExitStack() as undo:
            server_ranks = lockstep.run(
                functools.partial(_meet, source, control, kind, config, deadline) if control else None
            )
            if server_ranks is not None:
                undo.callback(server_ranks.abort)
            offers = lockstep.gather(server_ranks.offer if server_ranks else None)
            offer = next(offer for offer in offers if offer is not None)
            lockstep.run(functools.partial(server_ranks.ask_to_connect, deadline) if server_ranks else None)
            trainer_rank = lockstep.run(functools.partial(_prepare, source, offer, config, deadline))
            undo.callback(trainer_rank.close)
            lockstep.run(server_ranks.let_connect if server_ranks else None)
            lockstep.run(functools.partial(trainer_rank.connect, deadline))
            lockstep.run(functools.partial(server_ranks.collect, 0) if server_ranks else None)
            undo.pop_all()
        return cls(trainer_rank, server_ranks)

    def steps(self, version: int, deadline: Deadline) -> Iterator[Step]:
        self._num_refits += 1
        refit, server_ranks = self._num_refits, self._server_ranks
        yield functools.partial(server_ranks.announce, refit, version, deadline) if server_ranks else None
        yield functools.partial(self._trainer_rank.send, refit, version, deadline)
        yield functools.partial(server_ranks.collect, refit) if server_ranks else None

    def abort(self) -> None:
        self._trainer_rank.close()
        if self._server_ranks is not None:
            self._server_ranks.abort()

    def close(self) -> None:
        self.abort()


def _meet(
    source: Source,
    control: SGLangControl,
    kind: Literal["p2p", "local"],
    config: RefitConfig,
    deadline: Deadline,
) -> ServerRanks:
    """Ask the servers for their sizes, and open a store for them and for all trainer ranks."""
    inputs = PlanInputs(
        arch=source.arch,
        source=source.layout.mesh,
        servers=tuple(server_mesh(info) for info in control.describe(deadline)),
        quantization=config.quantize,
        element_size=next(iter(source.named_params()))[1].element_size(),
    )
    plan = inputs.make_plan()
    most_links = plan.most_links()
    host = address_towards_all(control.urls)
    timeout = datetime.timedelta(seconds=deadline.seconds)
    served = ServedStore(host, timeout)
    message = ControlMessage(
        plan=inputs,
        server=0,
        server_rank=0,
        transport=kind,
        store_host=served.address.host,
        store_port=served.address.port,
        store_key=served.address.key,
        connection=uuid.uuid4().hex,
        slot_bytes=slot_bytes(most_links, config.bucket_mib * 2**20),
        most_links=most_links,
        refit=0,
        version=0,
        verify=config.verify,
        timeout_s=deadline.seconds,
    )
    return ServerRanks(control, served, plan, message)


def _prepare(source: Source, offer: Offer, config: RefitConfig, deadline: Deadline) -> TrainerRank:
    """Compute this rank's part of the plan."""
    message = offer.message
    timeout = datetime.timedelta(seconds=deadline.seconds)
    store = reach_store(message.store_address, timeout)
    return TrainerRank(
        message,
        source.layout.rank,
        store,
        offer.urls,
        lost_servers=LostServers(reach_store(message.store_address, timeout)),
        make_slices=functools.partial(_slices, source, config.quantize),
    )


def _slices(source: Source, quantization: Quantization) -> SliceSource:
    """Return the slices of the current parameters.

    Collective over the tensor-parallel groups if weights are quantised.
    """
    if quantization == "none":
        return ShardSlices(source.named_params(), source.arch, source.values)
    return ShardQuantizer(source.named_params(), source.arch, source.layout, quantization, source.values)


def slot_bytes(most_links: int, bucket_bytes: int) -> int:
    """Return the size of one staging buffer, such that those of all links of any rank fit in ``bucket_bytes``.

    Args:
        most_links: see :meth:`RefitPlan.most_links`.
    """
    share = bucket_bytes // (DEPTH * most_links)
    return min(max(share, _SMALLEST_SLOT), _LARGEST_SLOT) // 4096 * 4096
