"""Cuts the transfers of one link into messages. Both ends compute the cuts, so that no header is sent. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.checks import require
from megatron_dypo.refit.plan.refit_plan import Transfer

_ALIGN = 16
"""Each part of a message starts at a multiple of this many bytes, so that it can be viewed in its dtype."""
_ALONE = 256 * 1024
"""A part of at least this many bytes is its own message. If contiguous, it is sent or received without a copy."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one transfer, and the place of their bytes in the message."""

    index: int
    """Number of the part in its link."""
    transfer: Transfer
    first_row: int
    """First row, counted within the transfer."""
    rows: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes that are sent together."""

    parts: tuple[Part, ...]
    num_bytes: int


def cut(transfers: Iterable[Transfer], dtypes: Mapping[str, torch.dtype], limit: int) -> Iterator[Message]:
    """Cut transfers into messages of at most ``limit`` bytes. Large parts get their own message; small ones share one.

    ``dtypes`` are the types of the server rank's parameters.

    Raises:
        ValueError: one row is longer than ``limit``.
    """
    held: list[Part] = []
    used = 0
    for part in _parts(transfers, dtypes, limit):
        start = -(-used // _ALIGN) * _ALIGN
        if held and (part.num_bytes >= _ALONE or start + part.num_bytes > limit):
            yield Message(tuple(held), used)
            held, start = [], 0
        held.append(Part(part.index, part.transfer, part.first_row, part.rows, start, part.num_bytes))
        used = start + part.num_bytes
        if part.num_bytes >= _ALONE:
            yield Message(tuple(held), used)
            held, used = [], 0
    if held:
        yield Message(tuple(held), used)


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8)


def part_of(message: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """View one part in the bytes of its message: [rows, cols] in the parameter's ``dtype``."""
    return message[part.offset : part.offset + part.num_bytes].view(dtype).view(part.rows, -1)


def _parts(transfers: Iterable[Transfer], dtypes: Mapping[str, torch.dtype], limit: int) -> Iterator[Part]:
    """Cut transfers that are longer than ``limit`` by rows. The offsets of the parts are set later."""
    index = 0
    for transfer in transfers:
        row_bytes = transfer.cols * dtypes[transfer.served_name].itemsize
        require(row_bytes <= limit, f"message limit={limit}", f"a row of {transfer.served_name} has {row_bytes} bytes")
        rows_at_once = limit // row_bytes
        for first in range(0, transfer.rows, rows_at_once):
            rows = min(rows_at_once, transfer.rows - first)
            yield Part(index, transfer, first, rows, 0, rows * row_bytes)
            index += 1
