"""Run one rank of ``refit.py``: the first two ranks are the trainer's, each further pair is a server's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.refit.checksums import checksum
from megatron_dypo.refit.control_message import GO, ControlMessage, PlanInputs, inventory_key, report_key
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh
from megatron_dypo.refit.plan.server_tensors import served_tensors
from megatron_dypo.refit.receiver import load
from megatron_dypo.refit.slices import ShardSlices, rectangle
from megatron_dypo.refit.transports.buckets import fill_buckets
from megatron_dypo.refit.transports.lost_peers import LostServers
from megatron_dypo.refit.transports.planned import slot_bytes
from megatron_dypo.refit.transports.trainer_rank import TrainerRank

TENSOR = 2
BUCKET_BYTES = 512 * 2**20
DTYPE = torch.bfloat16
DEADLINE_S = 600.0

Variants = dict[str, Callable[[], object]]


def answer(case: dict[str, int]) -> None:
    """Measure; print the result as one JSON object on the first rank."""
    dist.init_process_group("gloo")
    sources = dist.new_group([0, 1])
    holders = dist.new_group([0, *range(TENSOR, dist.get_world_size())])
    arch, rank = architecture(case), dist.get_rank()
    message = meeting(arch, case["servers"]) if rank == 0 else None
    messages = [message]
    dist.broadcast_object_list(messages, 0)
    assert messages[0] is not None
    end: SourceEnd | ServerEnd
    if rank < TENSOR:
        end = SourceEnd(messages[0], sources, holders)
    else:
        end = ServerEnd(messages[0], *divmod(rank - TENSOR, TENSOR), holders)
    variants = {name: in_step(action) for name, action in end.variants().items()}
    measure.interleaved(variants, 1)
    seconds, _ = measure.interleaved(variants, case["rounds"])
    sums = []
    for name in ("planned", "broadcast"):
        end.forget()
        variants[name]()
        sums.append(end.sums())
    assert sums[0] == sums[1], f"rank {rank}: the two ways brought different weights"
    bytes_in_place = torch.tensor([end.num_bytes if rank >= TENSOR else 0])
    dist.all_reduce(bytes_in_place)
    if rank == 0:
        print(json.dumps({"seconds": seconds, "bytes": int(bytes_in_place)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def architecture(case: dict[str, int]) -> Architecture:
    hidden = case["hidden"]
    return Architecture(
        family="llama",
        num_layers=case["layers"],
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, TENSOR),
        head_dim=64,
        ffn_hidden_size=4 * hidden,
        vocab_size=32_000,
        max_position_embeddings=4096,
        norm_epsilon=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )


_stores: list[dist.Store] = []


def meeting(arch: Architecture, num_servers: int) -> ControlMessage:
    """Return the message by which rank 0 tells all other ranks about the connection."""
    inputs = PlanInputs(
        arch=arch,
        source=Mesh(tensor=TENSOR),
        servers=(ServerMesh(tensor=TENSOR),) * num_servers,
        quantization="none",
        element_size=DTYPE.itemsize,
    )
    most_links = inputs.make_plan().most_links()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    _stores.append(store)
    return ControlMessage(
        plan=inputs,
        server=0,
        server_rank=0,
        transport="p2p",
        store_host="127.0.0.1",
        store_port=store.port,
        connection="benchmark",
        slot_bytes=slot_bytes(most_links, BUCKET_BYTES),
        most_links=most_links,
        refit=0,
        version=0,
        verify="sampled",
        timeout_s=DEADLINE_S,
    )


def in_step(action: Callable[[], object]) -> Callable[[], None]:
    """Return a step that all ranks begin together, and that ends on each rank once all have finished."""

    def step() -> None:
        dist.barrier()
        action()
        dist.barrier()

    return step


def raw_transfers(message: ControlMessage) -> dict[tuple[int, int], int]:
    """Return (trainer rank, the rank of this job that plays the server rank) → bytes."""
    links = message.plan.make_plan().link_bytes()
    return {
        (source, TENSOR * (1 + server) + server_rank): size for (source, server, server_rank), size in links.items()
    }


class SourceEnd:
    """One rank of the trainer."""

    num_bytes = 0

    def __init__(self, message: ControlMessage, sources: dist.ProcessGroup, holders: dist.ProcessGroup) -> None:
        self.message, self.arch, self.rank = message, message.plan.arch, dist.get_rank()
        self._sources, self._holders = sources, holders
        generator = torch.Generator().manual_seed(self.rank)
        self.rows = [row for row in family_rows(self.arch) if not row.is_copy]
        self.params = {}
        for row in self.rows:
            param = torch.empty(row.rule.mcore_shape(self.arch, TENSOR), dtype=DTYPE)
            self.params[row.mcore] = (
                param.random_(generator=generator) if row.rule.tp_dim is not None else param.fill_(1)
            )
        self._links = {
            server_rank: size for (source, server_rank), size in raw_transfers(message).items() if source == self.rank
        }
        self._raw = torch.ones(max(self._links.values()), dtype=torch.uint8)
        self._trainer_rank: TrainerRank | None = None
        self._refits = 0

    def variants(self) -> Variants:
        return {"planned": self.refit, "raw": self.send_raw, "broadcast": self.broadcast}

    def refit(self) -> None:
        self._trainer_rank = self._trainer_rank or self._connect()
        self._refits += 1
        self._trainer_rank.send(self._refits, self._refits, Deadline(DEADLINE_S))

    def send_raw(self) -> None:
        for work in [dist.isend(self._raw[:size], server_rank) for server_rank, size in self._links.items()]:
            assert work is not None
            work.wait()

    def broadcast(self) -> None:
        for bucket in fill_buckets(self._whole(), BUCKET_BYTES):
            header = [(bucket.names, bucket.shapes, bucket.payload.numel())]
            dist.broadcast_object_list(header, 0, group=self._holders)
            dist.broadcast(bucket.payload, 0, group=self._holders)
        if self.rank == 0:
            dist.broadcast_object_list([None], 0, group=self._holders)

    def forget(self) -> None:
        """Do nothing: no weights arrive at a trainer rank."""

    def sums(self) -> list[Any]:
        return []

    def _whole(self) -> Any:
        for row in self.rows:
            param = self.params[row.mcore]
            shards = [param]
            if row.rule.tp_dim is not None:
                shards = [torch.empty_like(param) for _ in range(TENSOR)] if self.rank == 0 else []
                dist.gather(param, shards or None, 0, group=self._sources)
            if self.rank == 0:
                yield from zip(row.hf, row.rule.merge(shards, self.arch), strict=True)

    def _connect(self) -> TrainerRank:
        message, plan = self.message, self.message.plan.make_plan()
        store = _stores[0] if _stores else dist.TCPStore("127.0.0.1", message.store_port, None, False)
        store.wait([inventory_key(e, t) for e in range(len(plan.servers)) for t in range(TENSOR)])
        urls = [f"server {server}" for server in range(len(plan.servers))]
        trainer_rank = TrainerRank(
            message,
            self.rank,
            store,
            urls,
            lost_servers=LostServers(dist.TCPStore("127.0.0.1", message.store_port, None, False)),
            make_slices=lambda: ShardSlices(self.params.items(), self.arch),
        )
        if self.rank == 0:
            store.set(GO, "")
        trainer_rank.connect(Deadline(DEADLINE_S))
        return trainer_rank


class ServerEnd:
    """One rank of a server, with the tensors that SGLang would hold there."""

    def __init__(self, message: ControlMessage, server: int, server_rank: int, holders: dist.ProcessGroup) -> None:
        self.message = dataclasses.replace(message, server=server, server_rank=server_rank)
        self._holders = holders
        self._store = dist.TCPStore("127.0.0.1", message.store_port, None, False)
        self.held: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[Tensor, Any]]] = {}
        arch = message.plan.arch
        for tensor in served_tensors(arch, message.plan.servers[server], server_rank):
            for layer in range(arch.num_layers) if LAYER in tensor.name else (None,):
                name = tensor.name.replace(LAYER, str(layer))
                self.held[name] = torch.zeros(tensor.shape, dtype=DTYPE)
                for part in tensor.rectangles:
                    self._places.setdefault(part.hf_name.replace(LAYER, str(layer)), []).append((self.held[name], part))
        self.num_bytes = sum(param.numel() * param.element_size() for param in self.held.values())
        rank = dist.get_rank()
        self._links = {source: size for (source, to), size in raw_transfers(message).items() if to == rank}
        self._raw = {source: torch.zeros(size, dtype=torch.uint8) for source, size in self._links.items()}
        self._refits = 0

    def variants(self) -> Variants:
        return {"planned": self.take_refit, "raw": self.take_raw, "broadcast": self.take_broadcast}

    def named_parameters(self) -> Any:
        """Return the names and tensors that the loader asks of a model."""
        return self.held.items()

    def take_refit(self) -> None:
        first = 0 if self._refits == 0 else self._refits + 1  # refit 0 opens the connection
        self._refits += 1
        for refit in range(first, self._refits + 1):
            message = dataclasses.replace(self.message, refit=refit, version=refit)
            model: Any = self
            load(model, [(message.to_json(), torch.empty(0))])
            report = json.loads(self._store.get(report_key(message.refit, message.server, message.server_rank)))
            assert "error" not in report, report

    def take_raw(self) -> None:
        for work in [dist.irecv(buffer, source) for source, buffer in self._raw.items()]:
            assert work is not None
            work.wait()

    def take_broadcast(self) -> None:
        while True:
            header: list[Any] = [None]
            dist.broadcast_object_list(header, 0, group=self._holders)
            if header[0] is None:
                return
            names, shapes, size = header[0]
            payload = torch.empty(size, dtype=torch.uint8)
            dist.broadcast(payload, 0, group=self._holders)
            start = 0
            for name, shape in zip(names, shapes, strict=True):
                end = start + torch.Size(shape).numel() * DTYPE.itemsize
                whole = payload[start:end].view(DTYPE).view(shape)
                for param, part in self._places[name]:
                    source = rectangle(whole, part.hf_row, part.hf_col, part.rows, part.cols)
                    rectangle(param, part.row, part.col, part.rows, part.cols).copy_(source)
                start = end

    def forget(self) -> None:
        for param in self.held.values():
            param.zero_()

    def sums(self) -> list[Any]:
        return [checksum(param).tolist() for param in self.held.values()]
