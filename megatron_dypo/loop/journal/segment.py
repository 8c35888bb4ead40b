"""One file of a journal: records that are only appended, each with its length and checksums.

A record is 16 bytes and then its payload::

    length of the payload (8)   CRC-32 of number and length (4)   CRC-32 of number, length and payload (4)

The number of a record in its file is in both checksums, so that a record counts only at its own place. A record is
written by one call without a buffer in between and without ``fsync``. It so survives a SIGKILL of the process that
wrote it: the kernel has the bytes. A crash of the machine may lose the end of the file, which only costs the sampling
of those groups.

Reading stops at the first record that is not whole. If the file ends within it, the process died while it wrote: the
end is ``TORN``, which is usual. Otherwise the file is ``DAMAGED``. Nothing after that place is used in either case.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEAD = struct.Struct("<QII")
_PLACE = struct.Struct("<QQ")
MAX_PAYLOAD = 2**32
"""A longer payload is refused, and a length above it is damage."""


class Ending(enum.Enum):
    """How the records of a file end."""

    WHOLE = "whole"
    TORN = "torn"
    """The file ends within its last record."""
    DAMAGED = "damaged"
    """A record does not have its checksum."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a record, from which it can be read again."""

    path: Path
    number: int
    start: int
    """Offset of its first byte."""
    size: int
    """Bytes of head and payload."""


def append(file: BinaryIO, number: int, payload: bytes) -> int:
    """Append record ``number`` to an unbuffered file; return the bytes that it takes.

    Raises:
        OSError: the file system is full, for example. The file then ends with a part of the record.
    """
    size = len(payload)
    if size > MAX_PAYLOAD:
        raise ValueError(f"a record of {size} bytes: at most {MAX_PAYLOAD} can be written")
    place = _PLACE.pack(number, size)
    record = _HEAD.pack(size, zlib.crc32(place), zlib.crc32(payload, zlib.crc32(place))) + payload
    left = memoryview(record)
    while left:  # a raw file may take a part of it
        left = left[file.write(left) :]
    return len(record)


def scan(path: Path) -> Iterator[tuple[Place, bytes] | Ending]:
    """Yield the place and the payload of each whole record, and at last how the records end."""
    with path.open("rb") as file:
        total, start, number = os.fstat(file.fileno()).st_size, 0, 0
        while True:
            payload = _read(file, number, total - start)
            if isinstance(payload, Ending):
                yield payload
                return
            size = _HEAD.size + len(payload)
            yield Place(path=path, number=number, start=start, size=size), payload
            start, number = start + size, number + 1


def read(place: Place) -> bytes | None:
    """Return the payload of a record that :func:`scan` found; None if it is not whole any more."""
    try:
        with place.path.open("rb") as file:
            file.seek(place.start)
            payload = _read(file, place.number, place.size)
    except OSError:
        return None
    return None if isinstance(payload, Ending) else payload


def _read(file: BinaryIO, number: int, left: int) -> bytes | Ending:
    """Read the record ``number`` of ``left`` remaining bytes."""
    if left <= 0:
        return Ending.WHOLE
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return Ending.TORN
    size, crc_of_head, crc = _HEAD.unpack(head)
    place = _PLACE.pack(number, size)
    if zlib.crc32(place) != crc_of_head or size > MAX_PAYLOAD:
        return Ending.DAMAGED
    if size > left - _HEAD.size:
        return Ending.TORN
    payload = file.read(size)
    if len(payload) < size:
        return Ending.TORN
    return payload if zlib.crc32(payload, zlib.crc32(place)) == crc else Ending.DAMAGED
