"""Streams: all bytes that a shard sends to the servers, in order, and the part that each holder sends. Pure.

The stream of a shard holds the parts that the first server needs, layer after layer, then the parts that the second
server needs, and so on. It is cut into equal blocks, one for each rank that holds the shard (a holder). A holder sends
the row blocks that begin in its block. There is one template per kind of layer, so only the answers to queries grow
with the number of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.layer_template import Encoding, Piece, Template, check_blocks, make_template
from megatron_dypo.refit.plan.rectangles import Rectangle
from megatron_dypo.refit.plan.served_tensor import ServedTensor
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.server_tensors import served_tensors
from megatron_dypo.refit.plan.trainer_shards import (
    Kind,
    Place,
    Shard,
    held_rectangles,
    num_shards,
    place_of,
    shards_of_stage,
)


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of a piece of one layer that one holder sends: from ``first`` up to, but without, ``end``."""

    piece: Piece
    layer: int | None
    first: int
    end: int


class Streams:
    """The streams between one trainer and some servers.

    Raises:
        ValueError: a mesh does not suit the architecture, or cuts blocks of scales.
    """

    def __init__(self, arch: Architecture, source: Mesh, servers: Sequence[ServerMesh], encoding: Encoding) -> None:
        self._arch, self._source, self._servers, self._encoding = arch, source, tuple(servers), encoding
        self.served: dict[ServerMesh, list[list[ServedTensor]]] = {
            server: [served_tensors(arch, server, server_rank) for server_rank in range(server.tensor)]
            for server in dict.fromkeys(self._servers)
        }
        self._parts = [self._parts_of(stage) for stage in range(source.pipeline)]
        self._template = functools.cache(self._make_template)
        self._server_starts = functools.cache(self._find_server_starts)
        self._check()

    def shards(self) -> Iterator[Shard]:
        """Yield every shard, stage after stage."""
        for stage in range(self._source.pipeline):
            yield from shards_of_stage(self._arch, self._source, stage)

    def shards_of(self, rank: int) -> list[Shard]:
        """List the shards that a rank of the trainer holds."""
        stage = rank // self._source.stage_size
        return [shard for shard in shards_of_stage(self._arch, self._source, stage) if rank in shard.holders]

    def senders(self, shard: Shard, server: int) -> Iterator[int]:
        """Yield the holders of a shard whose blocks touch the stream to a server, ascending."""
        starts, count = self._server_starts(shard), len(shard.holders)
        total = max(starts[-1], 1)
        first, last = starts[server] * count // total, starts[server + 1] * count // total
        for rank in shard.holders[max(first - 1, 0) : last + 1]:
            low, high = self._block(shard, rank)
            if low < starts[server + 1] and starts[server] < high:
                yield rank

    def cuts(self, shard: Shard, rank: int, server: int, server_rank: int | None = None) -> Iterator[Cut]:
        """Yield the cuts of a shard that a holder sends to a server, or to one rank of it, in order."""
        low, high = self._block(shard, rank)
        for start, template, layer in self._spans(shard, server, low, high):
            groups = (
                template.by_server_rank.values()
                if server_rank is None
                else (template.by_server_rank.get(server_rank, ()),)
            )
            for piece in (piece for group in groups for piece in group):
                first, end = piece.rows_before(low - start), piece.rows_before(high - start)
                if first < end:
                    yield Cut(piece, layer, first, end)

    def bytes_to(self, shard: Shard, rank: int, server: int) -> Iterator[tuple[int, int]]:
        """Yield (server rank, bytes that a holder sends it). A rank may occur more than once."""
        low, high = self._block(shard, rank)
        for start, template, _ in self._spans(shard, server, low, high):
            if low <= start and start + template.num_bytes <= high:
                yield from template.bytes_to.items()
                continue
            for server_rank, pieces in template.by_server_rank.items():
                for piece in pieces:
                    rows = piece.rows_before(high - start) - piece.rows_before(low - start)
                    yield server_rank, piece.bytes_of(rows)

    def _spans(self, shard: Shard, server: int, low: int, high: int) -> Iterator[tuple[int, Template, int | None]]:
        """Yield the parts of a shard's stream to a server that overlap a block: first byte, template, layer."""
        start = self._server_starts(shard)[server]
        for place, layer in self._parts[shard.stage]:
            template = self._template(shard.kind, shard.index, place, self._servers[server])
            if start < high and low < start + template.num_bytes:
                yield start, template, layer
            start += template.num_bytes

    def _block(self, shard: Shard, rank: int) -> tuple[int, int]:
        """Return the first byte of a holder's block in its shard's stream, and the byte after the last."""
        total, number, count = self._server_starts(shard)[-1], shard.holders.index(rank), len(shard.holders)
        return total * number // count, total * (number + 1) // count

    def _find_server_starts(self, shard: Shard) -> list[int]:
        """Return the bytes of a shard's stream at which the servers' parts begin, and the end of the last part."""
        sizes = {
            server: sum(
                self._template(shard.kind, shard.index, place, server).num_bytes
                for place, _ in self._parts[shard.stage]
            )
            for server in self.served
        }
        return list(accumulate((sizes[server] for server in self._servers), initial=0))

    def _parts_of(self, stage: int) -> list[tuple[Place, int | None]]:
        """List the parts of a stage in order: the embedding, its layers, the parameters after the layers."""
        parts: list[tuple[Place, int | None]] = [("first", None)] if stage == 0 else []
        parts += [
            (place_of(layer, self._arch), layer) for layer in self._source.layers_of(stage, self._arch.num_layers)
        ]
        return parts + ([("last", None)] if stage == self._source.pipeline - 1 else [])

    def _make_template(self, kind: Kind, index: int, place: Place, server: ServerMesh) -> Template:
        """Make one template. Different shards begin with different ranks of a server, so that they do not all send to
        the same rank at once."""
        held = held_rectangles(self._arch, self._source, kind, index, place)
        first = index * server.tensor // num_shards(self._arch, self._source)[kind]
        server_ranks = [(first + i) % server.tensor for i in range(server.tensor)]
        served = self.served[server]
        return make_template(
            held, [(server_rank, rectangles_of(served[server_rank])) for server_rank in server_ranks], self._encoding
        )

    def _check(self) -> None:
        """Raise ValueError if a mesh does not suit the architecture, or cuts blocks of scales."""
        for kind, count in num_shards(self._arch, self._source).items():
            for index in range(count):
                held = held_rectangles(self._arch, self._source, kind, index, "layer")
                check_blocks(held, self._encoding, f"the trainer's {kind} shard {index} of {count}")
        for server, ranks in self.served.items():
            for server_rank, tensors in enumerate(ranks):
                check_blocks(
                    rectangles_of(tensors), self._encoding, f"rank {server_rank} of {server.tensor} of a server"
                )


def rectangles_of(tensors: Sequence[ServedTensor]) -> list[Rectangle]:
    """List all rectangles of some tensors."""
    return [rectangle for tensor in tensors for rectangle in tensor.rectangles]
