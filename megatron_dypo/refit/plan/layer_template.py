"""Templates: the pieces of one layer that a trainer shard sends to a server. All layers of a kind share one template.

The pieces of a template form a stream of bytes, which may be cut between any two row blocks. A row block is one row, or
with ``fp8_block`` the 128 rows of a block, so that values and their scales stay together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_dypo.checks import require
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.models.quantized.names import BLOCK, Quantization, is_quantized
from megatron_dypo.refit.plan.rectangles import Rectangle, overlaps

SCALE_BYTES = 4
"""Bytes of a scale, which is fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """The type in which values are sent."""

    quantization: Quantization = "none"
    element_size: int = 2
    """Bytes of a value that is not quantised."""

    def is_quantized(self, hf_name: str) -> bool:
        """Return whether an HF tensor is sent in FP8; its name may contain ``{layer}``."""
        return self.quantization != "none" and is_quantized(hf_name.replace(LAYER, "0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One rectangle that is sent to one server rank. In its names ``{layer}`` stands for the layer."""

    start: int
    """The byte of the template at which the piece begins."""
    server_rank: int
    source: Rectangle
    """The rectangle of the shard that contains the piece."""
    served: Rectangle
    """The rectangle of the server rank that contains the piece."""
    hf_row: int
    hf_col: int
    rows: int
    cols: int
    value_bytes: int
    row_block: int
    """Rows that must stay together."""
    scales_per_row_block: int
    """Scales that are sent with each row block: none, one per block, or one per row."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of values and scales."""
        return self.bytes_of(self.rows)

    def bytes_of(self, rows: int) -> int:
        """Return the bytes of ``rows`` rows that begin at a row block."""
        return (
            rows * self.cols * self.value_bytes + -(-rows // self.row_block) * self.scales_per_row_block * SCALE_BYTES
        )

    def rows_before(self, position: int) -> int:
        """Return how many rows begin before this byte of the template, rounded to whole row blocks.

        Two neighbours that cut at the same byte get the same number.
        """
        blocks = -(-(position - self.start) // self.bytes_of(self.row_block))
        return min(max(blocks * self.row_block, 0), self.rows)


@dataclass(frozen=True, kw_only=True)
class Template:
    """The stream of pieces: first all pieces for one server rank, then all for the next."""

    by_server_rank: Mapping[int, Sequence[Piece]]
    """Server ranks in the order of sending."""
    bytes_to: Mapping[int, int]
    num_bytes: int


def make_template(
    sources: Sequence[Rectangle], server_ranks: Iterable[tuple[int, Sequence[Rectangle]]], encoding: Encoding
) -> Template:
    """Cut a shard's rectangles into pieces for a server's ranks, given in the order of sending."""
    by_server_rank: dict[int, list[Piece]] = {}
    bytes_to: defaultdict[int, int] = defaultdict(int)
    position = 0
    for server_rank, served in server_ranks:
        pieces = []
        for piece in _pieces(sources, server_rank, served, encoding, position):
            pieces.append(piece)
            position += piece.num_bytes
            bytes_to[server_rank] += piece.num_bytes
        if pieces:
            by_server_rank[server_rank] = pieces
    return Template(by_server_rank=by_server_rank, bytes_to=dict(bytes_to), num_bytes=position)


def check_blocks(rectangles: Iterable[Rectangle], encoding: Encoding, holder: str) -> None:
    """Raise ValueError if a block of scales is split over ranks, which SGLang does not allow.

    The error names the tensor, the cut and the rule.
    """
    if encoding.quantization != "fp8_block":
        return
    for rectangle in rectangles:
        if not encoding.is_quantized(rectangle.hf_name):
            continue
        for field in ("hf_row", "hf_col", "row", "col"):
            start = getattr(rectangle, field)
            require(
                start % BLOCK == 0,
                f"{rectangle.hf_name}: {holder} holds {rectangle.rows} × {rectangle.cols} of it, {field}={start}",
                f"fp8_block needs cuts at multiples of {BLOCK}",
            )


def _pieces(
    sources: Sequence[Rectangle], server_rank: int, served: Sequence[Rectangle], encoding: Encoding, position: int
) -> Iterator[Piece]:
    for source, place, (row, col, rows, cols) in overlaps(sources, served):
        value_bytes, row_block, scales = encoding.element_size, 1, 0
        if encoding.is_quantized(source.hf_name):
            value_bytes = 1
            if encoding.quantization == "fp8_block":
                row_block, scales = BLOCK, -(-cols // BLOCK)
            elif col == place.hf_col:
                # A row has one scale. It is sent with the first columns of the row that the server rank takes.
                scales = 1
        piece = Piece(
            start=position,
            server_rank=server_rank,
            source=source,
            served=place,
            hf_row=row,
            hf_col=col,
            rows=rows,
            cols=cols,
            value_bytes=value_bytes,
            row_block=row_block,
            scales_per_row_block=scales,
        )
        yield piece
        position += piece.num_bytes
