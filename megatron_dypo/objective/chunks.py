"""The chunks in which the fused log-probs are computed, and their memory. Pure, no torch: the plan asks too."""

from __future__ import annotations

_TILE_ROWS = 256
"""Rows that matmuls of a GPU compute at once; part of a tile takes as long as a whole one."""

LOGITS_SHARE = 0.75
"""Share of the memory budget in which torch's passes keep the logits of a chunk."""
SCRATCH_SHARE = 0.125
"""Share for torch's copies of a few rows of them."""
BLOCKS_SHARE = 0.125
"""Share for blocks of operands that are converted."""


def rows_of_chunks(num_rows: int, most: int) -> int:
    """Return the rows of each chunk but the first, which may have fewer: at most ``most``, and equally many.

    Chunks are whole tiles if both arguments are above one tile. Both arguments are at least 1.
    """
    if most > _TILE_ROWS:
        most -= most % _TILE_ROWS
    size = -(-num_rows // -(-num_rows // most))
    if most > _TILE_ROWS:
        size += -size % _TILE_ROWS
    return min(num_rows, size)
