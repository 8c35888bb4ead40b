"""The plan of a refit: which slice of a trainer rank's parameter goes where in a server rank's parameter. Pure data.

Both sides hold rectangles of HF tensors (:mod:`.trainer_shards`, :mod:`.server_tensors`). Each overlap of two
rectangles is sent once to every server rank that needs it. Ranks that hold the same data share the sending: all its
bytes, server after server, are cut into equal blocks, one per rank, so that each rank sends to few servers. The plan
depends only on sizes. So every rank of both sides computes its own part of it, from one template per kind of layer
(:mod:`.streams`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dypo.checks import require, require_positive
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.models.quantized.names import BLOCK, Quantization, scale_name, scale_shape
from megatron_dypo.models.quantized.refusals import require_quantizable
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.layer_template import SCALE_BYTES, Encoding
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.streams import Cut, Streams

__all__ = ["ServerMesh", "RefitPlan", "Mesh", "Transfer", "make_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One rectangle that is sent; rows and columns are those of matrices (:mod:`.rectangles`)."""

    source: int
    """Global rank of the trainer."""
    server: int
    server_rank: int
    """Tensor-parallel rank of the server."""
    source_name: str
    """Megatron-Core parameter: its name in the local spec, with global indices of layer and expert."""
    source_row: int
    source_col: int
    served_name: str
    """SGLang's parameter."""
    served_row: int
    served_col: int
    rows: int
    cols: int
    hf_name: str
    """The HF tensor that contains the rectangle; for scales, the checkpoint's tensor of scales."""
    hf_row: int
    hf_col: int
    part: Literal["value", "scale"] = "value"
    """``scale``: scales of a quantised tensor. All coordinates then count its blocks (with ``fp8_channel``: rows)."""


def make_plan(
    arch: Architecture,
    source: Mesh,
    servers: Sequence[ServerMesh],
    *,
    quantization: Quantization = "none",
    element_size: int = 2,
) -> RefitPlan:
    """Make the plan from a trainer to servers; ``element_size``: bytes of a value that is not quantised.

    Raises:
        ValueError: a mesh does not suit the architecture, or cuts blocks of scales.
    """
    require(len(servers) > 0, "servers=()", "name at least one")
    require_quantizable(arch, quantization)
    encoding = Encoding(quantization=quantization, element_size=element_size)
    require_positive(encoding, "element_size")
    return RefitPlan(arch, source, servers, encoding)


class RefitPlan:
    """The transfers of every rank of both sides; made by :func:`make_plan`."""

    def __init__(self, arch: Architecture, source: Mesh, servers: Sequence[ServerMesh], encoding: Encoding) -> None:
        self.arch = arch
        self.source = source
        self.servers = tuple(servers)
        self.encoding = encoding
        self._streams = Streams(arch, source, servers, encoding)

    def sends(self, rank: int) -> list[Transfer]:
        """List the transfers that a trainer rank sends, server after server in the order of :meth:`servers_of`."""
        return [
            transfer
            for server in self.servers_of(rank)
            for shard in self._streams.shards_of(rank)
            for cut in self._streams.cuts(shard, rank, server)
            for transfer in self._transfers(cut, rank, server)
        ]

    def receives(self, server: int, server_rank: int) -> list[Transfer]:
        """List the transfers that a server rank receives. Those of one trainer rank are in the order of sending."""
        tensor = self.servers[server].tensor
        require(
            0 <= server_rank < tensor,
            f"server_rank={server_rank}",
            f"must be below {tensor}, the ranks of server {server}",
        )
        return [
            transfer
            for shard in self._streams.shards()
            for rank in self._streams.senders(shard, server)
            for cut in self._streams.cuts(shard, rank, server, server_rank)
            for transfer in self._transfers(cut, rank, server)
        ]

    def sources_of(self, server: int) -> tuple[int, ...]:
        """Return the trainer ranks that send anything to a server, ascending."""
        senders = {
            rank
            for shard in self._streams.shards()
            for rank in self._streams.senders(shard, server)
            if self._sends_any(rank, server)
        }
        return tuple(sorted(senders))

    def servers_of(self, rank: int) -> tuple[int, ...]:
        """Return the servers that a trainer rank sends to, in its order of sending.

        Ranks of different stages and different tensor ranks begin with different servers.
        """
        world = self.source.world_size
        require(0 <= rank < world, f"rank={rank}", f"must be below {world}, the ranks of the trainer")
        servers = [server for server in range(len(self.servers)) if self._sends_any(rank, server)]
        stage, inside = divmod(rank, self.source.stage_size)
        first = (stage * len(servers) // self.source.pipeline + inside) % max(len(servers), 1)
        return (*servers[first:], *servers[:first])

    def link_bytes(self) -> dict[tuple[int, int, int], int]:
        """Return the bytes of each link (source, server, server_rank) that carries any."""
        links: defaultdict[tuple[int, int, int], int] = defaultdict(int)
        for shard in self._streams.shards():
            for server in range(len(self.servers)):
                for rank in self._streams.senders(shard, server):
                    for server_rank, num_bytes in self._streams.bytes_to(shard, rank, server):
                        links[rank, server, server_rank] += num_bytes
        return {link: num_bytes for link, num_bytes in links.items() if num_bytes}

    def most_links(self) -> int:
        """Return the number of links of the rank, of trainer and servers, that has the most; 0 without links."""
        ends: Counter[tuple[int, ...]] = Counter()
        for source, server, server_rank in self.link_bytes():
            ends.update([(source,), (server, server_rank)])
        return max(ends.values(), default=0)

    def bytes_of(self, transfer: Transfer) -> int:
        """Return the bytes of a transfer."""
        size = self.encoding.element_size
        if transfer.part == "scale":
            size = SCALE_BYTES
        elif self.encoding.is_quantized(transfer.hf_name):
            size = 1
        return transfer.rows * transfer.cols * size

    def served_shapes(self, server: int, server_rank: int) -> dict[str, tuple[int, ...]]:
        """Return name → shape of each parameter, scales included, that SGLang must hold on a server rank."""
        shapes: dict[str, tuple[int, ...]] = {}
        quantization = self.encoding.quantization
        for tensor in self._streams.served[self.servers[server]][server_rank]:
            is_quantized = any(self.encoding.is_quantized(rectangle.hf_name) for rectangle in tensor.rectangles)
            for layer in range(self.arch.num_layers) if LAYER in tensor.name else (None,):
                if layer is not None and not tensor.is_in(layer, self.arch):
                    continue
                name = _at(tensor.name, layer)
                shapes[name] = tensor.shape
                if is_quantized:
                    scales = scale_shape(quantization, tensor.shape[-2:])
                    shapes[scale_name(name, quantization)] = (*tensor.shape[:-2], *scales)
        return shapes

    def matrix_columns(self, server: int, server_rank: int) -> dict[str, int]:
        """Return name → columns of the matrix that transfers address, for parameters in which it is not the last
        axis."""
        columns: dict[str, int] = {}
        for tensor in self._streams.served[self.servers[server]][server_rank]:
            if tensor.matrix_columns is not None:
                assert LAYER in tensor.name, "such parameters are in layers"
                columns |= {_at(tensor.name, n): tensor.matrix_columns for n in range(self.arch.num_layers)}
        return columns

    def _sends_any(self, rank: int, server: int) -> bool:
        shards = self._streams.shards_of(rank)
        return any(True for shard in shards for _ in self._streams.cuts(shard, rank, server))

    def _transfers(self, cut: Cut, rank: int, server: int) -> Iterator[Transfer]:
        """Yield the values of a cut, then its scales."""
        piece, layer = cut.piece, cut.layer
        row, col = piece.hf_row + cut.first, piece.hf_col
        values = Transfer(
            source=rank,
            server=server,
            server_rank=piece.server_rank,
            source_name=_at(piece.source.name, layer),
            source_row=piece.source.row + row - piece.source.hf_row,
            source_col=piece.source.col + col - piece.source.hf_col,
            served_name=_at(piece.served.name, layer),
            served_row=piece.served.row + row - piece.served.hf_row,
            served_col=piece.served.col + col - piece.served.hf_col,
            rows=cut.end - cut.first,
            cols=piece.cols,
            hf_name=_at(piece.source.hf_name, layer),
            hf_row=row,
            hf_col=col,
        )
        yield values
        if piece.scales_per_row_block:
            yield _scales(values, self.encoding.quantization)


def _scales(values: Transfer, quantization: Quantization) -> Transfer:
    """Return the scales of a rectangle of values: one per block, or a column with one per row."""
    in_blocks = quantization == "fp8_block"
    height = BLOCK if in_blocks else 1
    return replace(
        values,
        part="scale",
        served_name=scale_name(values.served_name, quantization),
        hf_name=scale_name(values.hf_name, quantization),
        source_row=values.source_row // height,
        served_row=values.served_row // height,
        hf_row=values.hf_row // height,
        rows=-(-values.rows // height),
        source_col=values.source_col // BLOCK if in_blocks else 0,
        served_col=values.served_col // BLOCK if in_blocks else 0,
        hf_col=values.hf_col // BLOCK if in_blocks else 0,
        cols=-(-values.cols // BLOCK) if in_blocks else 1,
    )


def _at(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace(LAYER, str(layer))
