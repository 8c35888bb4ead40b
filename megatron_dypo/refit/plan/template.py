"""What one shard of the trainer gives to one server, of one layer of each kind: :mod:`.plan` repeats it for each layer.

A template is a stream of bytes. It can be cut between any two bands of rows; a band is one row, or with ``fp8_block``
the 128 rows of a block, so that values and their scales stay together.
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
"""Scales are fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How values travel."""

    quantization: Quantization = "none"
    element_size: int = 2
    """Bytes of a value that is not quantised."""

    def is_quantized(self, hf_name: str) -> bool:
        """Whether this HF tensor, ``{layer}`` in its name or not, travels in FP8."""
        return self.quantization != "none" and is_quantized(hf_name.replace(LAYER, "0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """One rectangle on its way to one rank of the server; ``{layer}`` stands for the layer in its names."""

    start: int
    """Byte of the template that it begins at."""
    server_rank: int
    source: Rectangle
    """What the shard holds around it."""
    served: Rectangle
    """What the rank of the server holds around it."""
    hf_row: int
    hf_col: int
    rows: int
    cols: int
    value_bytes: int
    band: int
    scales_of_band: int
    """Scales that go with each band: none, one a block, or one a row."""

    @property
    def num_bytes(self) -> int:
        return self.bytes_of(self.rows)

    def bytes_of(self, rows: int) -> int:
        """Bytes of this many of its rows, from the first or from another band's first on."""
        return rows * self.cols * self.value_bytes + -(-rows // self.band) * self.scales_of_band * SCALE_BYTES

    def rows_before(self, position: int) -> int:
        """Rows that begin before this byte of the template, in whole bands: neighbours cut there agree."""
        bands = -(-(position - self.start) // self.bytes_of(self.band))
        return min(max(bands * self.band, 0), self.rows)


@dataclass(frozen=True, kw_only=True)
class Template:
    """Atoms one after the other, as a stream of bytes: all that goes to one rank, then to the next."""

    by_server_rank: Mapping[int, Sequence[Atom]]
    """In the order of sending."""
    bytes_to: Mapping[int, int]
    num_bytes: int


def make_template(
    sources: Sequence[Rectangle], server_ranks: Iterable[tuple[int, Sequence[Rectangle]]], encoding: Encoding
) -> Template:
    """From a shard's rectangles to those of a server's ranks, given in the order in which they are to be served."""
    by_server_rank: dict[int, list[Atom]] = {}
    bytes_to: defaultdict[int, int] = defaultdict(int)
    position = 0
    for server_rank, served in server_ranks:
        atoms = []
        for atom in _atoms(sources, server_rank, served, encoding, position):
            atoms.append(atom)
            position += atom.num_bytes
            bytes_to[server_rank] += atom.num_bytes
        if atoms:
            by_server_rank[server_rank] = atoms
    return Template(by_server_rank=by_server_rank, bytes_to=dict(bytes_to), num_bytes=position)


def check_blocks(rectangles: Iterable[Rectangle], encoding: Encoding, holder: str) -> None:
    """That blocks of scales are whole on one rank, which SGLang asks for too.

    Raises:
        ValueError: names the tensor, where it is cut, and the rule.
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


def _atoms(
    sources: Sequence[Rectangle], server_rank: int, served: Sequence[Rectangle], encoding: Encoding, position: int
) -> Iterator[Atom]:
    for source, place, (row, col, rows, cols) in overlaps(sources, served):
        value_bytes, band, scales = encoding.element_size, 1, 0
        if encoding.is_quantized(source.hf_name):
            value_bytes = 1
            if encoding.quantization == "fp8_block":
                band, scales = BLOCK, -(-cols // BLOCK)
            elif col == place.hf_col:
                # A row's one scale goes with the first of the columns that the server rank takes of that row.
                scales = 1
        atom = Atom(
            start=position,
            server_rank=server_rank,
            source=source,
            served=place,
            hf_row=row,
            hf_col=col,
            rows=rows,
            cols=cols,
            value_bytes=value_bytes,
            band=band,
            scales_of_band=scales,
        )
        yield atom
        position += atom.num_bytes
