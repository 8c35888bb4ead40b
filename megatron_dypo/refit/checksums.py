"""Checksums of sent bytes. They are exact, independent of the dtype, and cheap compared with sending. Pure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Verify = Literal["off", "sampled", "full"]

SAMPLE_EVERY = 16
"""``sampled`` compares one part out of this many, different ones in each version, so all parts in this many
versions."""

_COLUMNS = 512


def should_verify(index: int, version: int, mode: Verify) -> bool:
    """Return whether part ``index`` of a link is compared in the refit of ``version``. Both ends get the same
    answer."""
    return mode == "full" or (mode == "sampled" and (index + version) % SAMPLE_EVERY == 0)


def checksum(data: Tensor) -> Tensor:
    """Return [2] int64: Σ wᵢ and Σ i·wᵢ modulo 2⁶⁴ over the 8-byte words of a contiguous tensor, padded with zeros.

    The first sum detects a changed word, the second also swapped words.
    """
    raw = data.detach().reshape(-1).view(torch.uint8)
    whole = raw.numel() // (8 * _COLUMNS) * (8 * _COLUMNS)
    # A view as int64 needs a start at a multiple of eight bytes; a row may start elsewhere.
    head = raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()
    tail = torch.zeros(8 * _COLUMNS, dtype=torch.uint8, device=raw.device)
    tail[: raw.numel() - whole] = raw[whole:]
    sums = _weighted(head.view(torch.int64).view(-1, _COLUMNS), 0)
    return sums + _weighted(tail.view(torch.int64).view(1, _COLUMNS), whole // 8)


def _weighted(words: Tensor, first: int) -> Tensor:
    """Return both sums of a [rows, columns] matrix of words; the number of its first word is ``first``.

    With i = first + columns · row + column, Σ i·w follows from the sums of rows and columns, without a copy of the
    words.
    """
    num_rows, num_columns = words.shape
    row_sums, column_sums = words.sum(1), words.sum(0)
    rows = torch.arange(num_rows, device=words.device) * num_columns + first
    columns = torch.arange(num_columns, device=words.device)
    return torch.stack([row_sums.sum(), (row_sums * rows).sum() + (column_sums * columns).sum()])
