"""A file of a journal: whatever end a crash gives it, and whatever bit flips, no wrong record is read."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from megatron_dypo.loop.journal.segment import Ending, Place, append, read, scan

PAYLOADS = [b"", b"J{}", bytes(range(240, 256)), b"\0" * 9, b"last"]


def written(path: Path) -> list[int]:
    """Write PAYLOADS; return the offset at which each begins, and the size of the file."""
    starts = [0]
    with path.open("wb", buffering=0) as file:
        for number, payload in enumerate(PAYLOADS):
            starts.append(starts[-1] + append(file, number, payload))
    return starts


def found(path: Path) -> tuple[list[bytes], Ending]:
    *records, end = scan(path)
    assert isinstance(end, Ending)
    payloads = []
    for record in records:
        assert not isinstance(record, Ending)
        place, payload = record
        assert read(place) == payload
        payloads.append(payload)
    return payloads, end


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    written(tmp_path / "s.bin")
    assert found(tmp_path / "s.bin") == (PAYLOADS, Ending.WHOLE)
    (tmp_path / "empty.bin").touch()
    assert found(tmp_path / "empty.bin") == ([], Ending.WHOLE)


def test_a_file_that_ends_at_any_byte_has_the_records_before_it(tmp_path: Path) -> None:
    path, whole = tmp_path / "s.bin", tmp_path / "whole.bin"
    starts, content = written(whole), whole.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        num_whole = sum(end <= size for end in starts[1:])
        end = Ending.WHOLE if size in starts else Ending.TORN
        assert found(path) == (PAYLOADS[:num_whole], end), size


def test_no_flipped_bit_makes_a_wrong_record(tmp_path: Path) -> None:
    path, whole = tmp_path / "s.bin", tmp_path / "whole.bin"
    starts, content = written(whole), whole.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        payloads, end = found(path)
        num_before = sum(stop <= bit // 8 for stop in starts[1:])
        assert (payloads, end) == (PAYLOADS[:num_before], Ending.DAMAGED), bit


@pytest.mark.parametrize("seed", range(3))
def test_records_that_changed_places_are_not_read(tmp_path: Path, seed: int) -> None:
    """A checksum of a record alone would accept them."""
    path = tmp_path / "s.bin"
    starts, content = written(path), path.read_bytes()
    parts = [content[start:end] for start, end in itertools.pairwise(starts)]
    order = list(range(len(parts)))
    random.Random(seed).shuffle(order)
    path.write_bytes(b"".join(parts[number] for number in order))
    num_in_place = next((place for place, number in enumerate(order) if place != number), len(order))
    assert found(path) == (PAYLOADS[:num_in_place], Ending.DAMAGED)


def test_a_place_whose_file_went_or_changed_has_no_record(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    starts = written(path)
    place = Place(path=path, number=2, start=starts[2], size=starts[3] - starts[2])
    assert read(place) == PAYLOADS[2]
    content = bytearray(path.read_bytes())
    content[starts[2] + 20] ^= 1
    path.write_bytes(content)
    assert read(place) is None
    path.unlink()
    assert read(place) is None
