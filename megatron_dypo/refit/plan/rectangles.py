"""Rectangles of HF tensors that trainer and servers hold, and their overlaps. Pure, no torch.

Every tensor is treated as a matrix: ``t.view(-1, t.shape[-1])``, or ``t.view(-1, 1)`` for a vector.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """``rows`` × ``cols`` entries of an HF tensor's matrix, and their place in the matrix of one rank's parameter."""

    name: str
    """Name of the parameter. In both names ``{layer}`` stands for the layer."""
    row: int
    col: int
    hf_name: str
    hf_row: int
    hf_col: int
    rows: int
    cols: int


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a tensor that is treated as a matrix."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def overlaps(
    sources: Iterable[Rectangle], served: Iterable[Rectangle]
) -> Iterator[tuple[Rectangle, Rectangle, tuple[int, int, int, int]]]:
    """Yield every pair of rectangles that share entries, in the order of ``sources``, then of ``served``.

    The last item is the shared part in the HF tensor: first row, first column, rows, columns.
    """
    by_name: defaultdict[str, list[Rectangle]] = defaultdict(list)
    for place in served:
        by_name[place.hf_name].append(place)
    for source in sources:
        for place in by_name[source.hf_name]:
            row, col = max(source.hf_row, place.hf_row), max(source.hf_col, place.hf_col)
            rows = min(source.hf_row + source.rows, place.hf_row + place.rows) - row
            cols = min(source.hf_col + source.cols, place.hf_col + place.cols) - col
            if rows > 0 and cols > 0:
                yield source, place, (row, col, rows, cols)
