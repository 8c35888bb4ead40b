"""Both ends of a refit without Megatron and without SGLang: ranks that hold shards of a random model, and servers over
real HTTP with a process for each tensor-parallel rank, which runs the package's loader on a bag of parameters.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows, match, table
from megatron_dypo.models.families.table import EXPERT, LAYER
from megatron_dypo.models.rules import Rule
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.server_tensors import served_tensors
from megatron_dypo.refit.slices import rectangle
from megatron_dypo.refit.transports.messages import as_bytes
from tests.support.dist.spawn import forking
from tests.support.fake_control import FakeServer

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Parameters of a server's rank: name → (shape, dtype)."""


def hf_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make the HF tensor ``name`` of the random model ``seed``; it is the same in every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def hf_tensors(arch: Architecture, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows = [row for row in family_rows(arch) if not row.is_copy]
    shapes = {name: shape for row in rows for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True)}
    return {name: hf_tensor(name, shape, seed, dtype) for name, shape in shapes.items()}


def plain_layout(axes: Mesh, rank: int) -> MeshRank:
    """Return the layout of one rank of a mesh without process groups, which planned refits do not use."""
    groups: dict[str, Any] = dict.fromkeys(
        ("tp_group", "pp_group", "cp_group", "dp_group", "replica_group", "leaders_group")
    )
    return MeshRank(mesh=axes, rank=rank, **groups)


def held_names(arch: Architecture, axes: Mesh, layout: MeshRank) -> list[str]:
    """Return the names of a rank's Megatron-Core parameters."""
    layers = axes.layers_of(layout.pp_rank, arch.num_layers)
    experts = arch.experts.num_experts // axes.expert if arch.experts else 0
    owned = range(layout.ep_rank * experts, (layout.ep_rank + 1) * experts)
    names = []
    for row in table(arch):
        if LAYER in row.mcore:
            ours = owned if EXPERT in row.mcore else (None,)
            names += [row.at(layer, expert).mcore for layer in layers if row.is_in(layer, arch) for expert in ours]
        elif layout.is_first_stage if row.mcore.startswith("embedding") else layout.is_last_stage:
            names.append(row.mcore)
    return names


def shard(name: str, arch: Architecture, layout: MeshRank, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one parameter of a rank, cut out of the random model."""
    row = match(name, arch)
    tensors = [hf_tensor(n, s, seed, dtype) for n, s in zip(row.hf, row.rule.hf_shapes(arch), strict=True)]
    ranks = (0, 1) if row.is_expert else (layout.tp_rank, layout.tensor)
    rule: Rule = row.rule
    return rule.shard(tensors, arch, *ranks)


def served_shapes(
    arch: Architecture, server: ServerMesh, server_rank: int, dtype: torch.dtype = torch.float32
) -> Shapes:
    return {name: (tuple(shape), type_of(name, arch, dtype)) for name, shape, _ in _served(arch, server, server_rank)}


def type_of(name: str, arch: Architecture, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a served parameter: SGLang's GLM-4.5 has routers in fp32 (models/glm4_moe.py, Glm4MoeGate)."""
    return torch.float32 if arch.family == "glm4_moe" and ".mlp.gate." in name else dtype


def served_params(arch: Architecture, server: ServerMesh, server_rank: int, hf: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the parameters that a server's rank must hold, put together from whole HF tensors."""
    params = {}
    for name, shape, parts in _served(arch, server, server_rank):
        param = params[name] = torch.zeros(shape, dtype=type_of(name, arch, next(iter(hf.values())).dtype))
        for part, hf_name in parts:
            source = rectangle(hf[hf_name], part.hf_row, part.hf_col, part.rows, part.cols)
            rectangle(param, part.row, part.col, part.rows, part.cols).copy_(source)
    return {name: bytes(as_bytes(param).numpy()) for name, param in params.items()}


def _served(
    arch: Architecture, server: ServerMesh, server_rank: int
) -> Iterator[tuple[str, Any, list[tuple[Any, str]]]]:
    for tensor in served_tensors(arch, server, server_rank):
        for layer in range(arch.num_layers) if LAYER in tensor.name else (None,):
            if layer is not None and not tensor.is_in(layer, arch):
                continue
            at = str(layer)
            parts = [(part, part.hf_name.replace(LAYER, at)) for part in tensor.rectangles]
            yield tensor.name.replace(LAYER, at), tensor.shape, parts


class Bag(torch.nn.Module):
    """Parameters under any names, filled with a value that no model has."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.held = {
            name: torch.full((torch.Size(shape).numel() * dtype.itemsize,), 0x55, dtype=torch.uint8)
            .view(dtype)
            .view(shape)
            for name, (shape, dtype) in shapes.items()
        }

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        yield from self.held.items()


Prepare = Callable[[], None]


class StandInServer(FakeServer):
    """A server whose ranks are processes that run the package's loader, as SGLang's schedulers do."""

    def start_ranks(self, ranks: Sequence[Shapes], prepare: Prepare | None = None) -> None:
        """Start the processes. ``prepare`` runs first in each, for example to make it misbehave."""
        context = forking()
        self.one_at_a_time = threading.Lock()
        self.pipes: list[Connection] = []
        self.processes = []
        for shapes in ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_rank, args=(theirs, shapes, prepare), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()  # wait until it is ready: a server answers only then

    def stop_ranks(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def params(self, server_rank: int) -> dict[str, bytes]:
        """Return the parameters of a rank, once its current refit has ended."""
        with self.one_at_a_time:
            self.pipes[server_rank].send(("params", None))
            params: dict[str, bytes] = self.pipes[server_rank].recv()
        return params

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/update_weights_from_tensor":
            return super().answer(path, body)
        self.calls.append((path, {}))
        with self.one_at_a_time:
            for pipe, payload in zip(self.pipes, body["serialized_named_tensors"], strict=True):
                pipe.send(("load", payload))
            try:
                for pipe in self.pipes:
                    pipe.recv()
            except EOFError:
                # Like SGLang's server, it does not outlive a scheduler: the connection closes without an answer.
                self.die()
                raise
        return 200, {"success": True}


@contextlib.contextmanager
def standin_server(
    arch: Architecture, layout: ServerMesh, ranks: Sequence[Shapes], prepare: Prepare | None = None
) -> Iterator[StandInServer]:
    server = StandInServer(
        model_type=arch.family,
        tp_size=layout.tensor,
        ep_size=layout.expert,
        settings={
            "attn_dp_size": layout.attention_data,
            "enable_dp_attention": layout.attention_data > 1,
            "enable_dp_lm_head": layout.output_by_attention,
            "moe_dense_tp_size": 1 if layout.whole_dense else None,
        },
        loaders=("megatron_dypo.refit.receiver.load",),
    )
    server.start_ranks(ranks, prepare)
    server.start()
    try:
        yield server
    finally:
        server.die()
        server.stop_ranks()


def _serve_rank(pipe: Connection, shapes: Shapes, prepare: Prepare | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from megatron_dypo.refit.receiver import load

    if prepare is not None:
        prepare()
    model = Bag(shapes)
    pipe.send(None)
    while True:
        try:
            command, argument = pipe.recv()
        except EOFError:
            return
        if command == "load":
            load(model, pickle.loads(base64.b64decode(argument)))
            pipe.send(None)
        elif command == "params":
            # Send bytes: tensors would be sent as shared memory, which ends with this process.
            pipe.send({name: bytes(as_bytes(param).numpy()) for name, param in model.held.items()})
