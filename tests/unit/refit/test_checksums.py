"""Checksums find changes on the way, for every dtype and any place of the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.refit.checksums import SAMPLE_EVERY, checksum, should_verify


def by_definition(data: bytes) -> list[int]:
    """Compute Σ wᵢ and Σ i·wᵢ modulo 2⁶⁴, as signed numbers."""
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little", signed=True) for i in range(0, len(padded), 8)]
    sums = sum(words), sum(i * word for i, word in enumerate(words))
    return [(value + 2**63) % 2**64 - 2**63 for value in sums]


@settings(deadline=None)
@given(st.integers(0, 20_000), st.integers(0, 2**32), st.integers(0, 7))
def test_both_sums_are_those_of_the_definition(length, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (offset + length,), dtype=torch.uint8, generator=generator)[offset:]
    assert checksum(data).tolist() == by_definition(bytes(data.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_the_dtype_does_not_matter(dtype):
    data = torch.randn(3, 1000).to(dtype)
    assert torch.equal(checksum(data), checksum(data.view(torch.uint8)))


def test_a_flipped_bit_and_exchanged_rows_are_found():
    data = torch.randn(1030, 7)
    flipped, exchanged = data.clone(), data.clone()
    flipped.view(torch.uint8)[1029, 5] ^= 1
    exchanged[[3, 900]] = data[[900, 3]]
    assert not torch.equal(checksum(flipped), checksum(data))
    # Seven floats a row: words are shared between rows, so take rows that are whole words.
    even, swapped = data.view(-1, 14), data.view(-1, 14).clone()
    swapped[[3, 400]] = even[[400, 3]]
    assert checksum(swapped)[0] == checksum(even)[0]
    assert checksum(swapped)[1] != checksum(even)[1]
    assert not torch.equal(checksum(exchanged), checksum(data))


def test_sampling_comes_round_to_every_part():
    parts = range(100)
    seen = [[index for index in parts if should_verify(index, version, "sampled")] for version in range(SAMPLE_EVERY)]
    assert sorted(index for indices in seen for index in indices) == list(parts)
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert all(should_verify(index, 3, "full") and not should_verify(index, 3, "off") for index in parts)
