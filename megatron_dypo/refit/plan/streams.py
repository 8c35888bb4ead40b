"""What the holders of each shard send to each server, as streams of bytes that the holders share out: pure.

The stream of a shard is all that goes from it to the first server, layer after layer, then all that goes to the second,
and so on. It is cut into as many equal blocks as ranks hold the shard; a rank sends the bands of rows that begin in its
block. Templates are made once for each kind of layer, so that nothing here grows with layers but what is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.refit.plan.held import (
    Kind,
    Place,
    Shard,
    SourceLayout,
    held_rectangles,
    num_shards,
    shards_of_stage,
)
from megatron_dypo.refit.plan.rectangles import Rectangle
from megatron_dypo.refit.plan.served import ServedTensor, ServerMesh, served_tensors
from megatron_dypo.refit.plan.template import Atom, Encoding, Template, check_blocks, make_template


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows from ``first`` to before ``end`` of an atom, of one layer: what one holder sends of it."""

    atom: Atom
    layer: int | None
    first: int
    end: int


class Streams:
    """The streams between one trainer and some servers.

    Raises:
        ValueError: a layout that does not suit the architecture, or that cuts blocks of scales.
    """

    def __init__(
        self, arch: Architecture, source: SourceLayout, servers: Sequence[ServerMesh], encoding: Encoding
    ) -> None:
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
        """Every shard, stage after stage."""
        for stage in range(self._source.pipeline):
            yield from shards_of_stage(self._arch, self._source, stage)

    def shards_of(self, rank: int) -> list[Shard]:
        """What a rank of the trainer holds."""
        stage = rank // self._source.stage_size
        return [shard for shard in shards_of_stage(self._arch, self._source, stage) if rank in shard.holders]

    def senders(self, shard: Shard, server: int) -> Iterator[int]:
        """The holders of a shard whose blocks touch the stream to a server, ascending."""
        starts, count = self._server_starts(shard), len(shard.holders)
        total = max(starts[-1], 1)
        first, last = starts[server] * count // total, starts[server + 1] * count // total
        for rank in shard.holders[max(first - 1, 0) : last + 1]:
            low, high = self._block(shard, rank)
            if low < starts[server + 1] and starts[server] < high:
                yield rank

    def cuts(self, shard: Shard, rank: int, server: int, server_rank: int | None = None) -> Iterator[Cut]:
        """What a holder sends of a shard to a server, or to one rank of it, in order."""
        low, high = self._block(shard, rank)
        for start, template, layer in self._spans(shard, server, low, high):
            groups = (
                template.by_server_rank.values()
                if server_rank is None
                else (template.by_server_rank.get(server_rank, ()),)
            )
            for atom in (atom for group in groups for atom in group):
                first, end = atom.rows_before(low - start), atom.rows_before(high - start)
                if first < end:
                    yield Cut(atom, layer, first, end)

    def bytes_to(self, shard: Shard, rank: int, server: int) -> Iterator[tuple[int, int]]:
        """Ranks of a server and bytes that a holder sends them; a rank may come up more than once."""
        low, high = self._block(shard, rank)
        for start, template, _ in self._spans(shard, server, low, high):
            if low <= start and start + template.num_bytes <= high:
                yield from template.bytes_to.items()
                continue
            for server_rank, atoms in template.by_server_rank.items():
                for atom in atoms:
                    rows = atom.rows_before(high - start) - atom.rows_before(low - start)
                    yield server_rank, atom.bytes_of(rows)

    def _spans(self, shard: Shard, server: int, low: int, high: int) -> Iterator[tuple[int, Template, int | None]]:
        """The parts of a shard's stream to a server that touch a block: first byte, template, layer."""
        start = self._server_starts(shard)[server]
        for place, layer in self._parts[shard.stage]:
            template = self._template(shard.kind, shard.index, place, self._servers[server])
            if start < high and low < start + template.num_bytes:
                yield start, template, layer
            start += template.num_bytes

    def _block(self, shard: Shard, rank: int) -> tuple[int, int]:
        """The bytes of a shard's stream that are one holder's."""
        total, number, count = self._server_starts(shard)[-1], shard.holders.index(rank), len(shard.holders)
        return total * number // count, total * (number + 1) // count

    def _find_server_starts(self, shard: Shard) -> list[int]:
        """Where the stream to each server begins in a shard's stream, and where the last one ends."""
        sizes = {
            server: sum(
                self._template(shard.kind, shard.index, place, server).num_bytes
                for place, _ in self._parts[shard.stage]
            )
            for server in self.served
        }
        return list(accumulate((sizes[server] for server in self._servers), initial=0))

    def _parts_of(self, stage: int) -> list[tuple[Place, int | None]]:
        """What a stage holds, in order: the embedding, its layers, what follows the layers."""
        parts: list[tuple[Place, int | None]] = [("first", None)] if stage == 0 else []
        parts += [("layer", layer) for layer in self._source.layers_of(stage, self._arch.num_layers)]
        return parts + ([("last", None)] if stage == self._source.pipeline - 1 else [])

    def _make_template(self, kind: Kind, index: int, place: Place, server: ServerMesh) -> Template:
        """Shards begin with different ranks of a server, so that not all send to the same one at once."""
        held = held_rectangles(self._arch, self._source, kind, index, place)
        first = index * server.tensor // num_shards(self._arch, self._source)[kind]
        server_ranks = [(first + i) % server.tensor for i in range(server.tensor)]
        served = self.served[server]
        return make_template(
            held, [(server_rank, rectangles_of(served[server_rank])) for server_rank in server_ranks], self._encoding
        )

    def _check(self) -> None:
        """What both sides hold, for errors: layouts that do not fit, cuts of blocks."""
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
    """All rectangles of some tensors."""
    return [rectangle for tensor in tensors for rectangle in tensor.rectangles]
