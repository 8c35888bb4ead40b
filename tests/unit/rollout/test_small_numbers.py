"""The quick way to read small numbers from base64 gives what the decoding gives, or nothing."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.rollout.small_numbers import read_small


def encoded(numbers: object) -> bytes:
    return base64.b64encode(np.asarray(numbers, "<i4").tobytes())


def test_every_number_is_read_at_every_place() -> None:
    for shift in range(3):
        numbers = np.roll(np.arange(255), shift)
        found = read_small(memoryview(encoded(numbers)), 255)
        assert found is not None
        np.testing.assert_array_equal(found, numbers)


def test_a_part_of_a_text_at_any_address_is_read() -> None:
    numbers = np.arange(30)
    for start in range(9):
        found = read_small(memoryview(b"x" * start + encoded(numbers))[start:], 30)
        assert found is not None
        assert found.tolist() == numbers.tolist()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("number", [-1, 7, 255, 256, 2**16, 2**24 + 1, 2**31 - 1])
def test_a_number_outside_the_limit_is_not_read(place: int, number: int) -> None:
    numbers = [0, 0, 0, 1, 2, 3]
    assert read_small(memoryview(encoded(numbers)), 7) is not None
    numbers[3 + place] = number
    assert read_small(memoryview(encoded(numbers)), 7) is None


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_text_with_padding_or_a_part_of_a_number_is_not_read(count: int) -> None:
    assert read_small(memoryview(encoded([1] * count)), 7) is None


SOUND = encoded(np.arange(12) * 21)
LETTERS = st.sampled_from([bytes([one]) for one in b"ABQgw/+=$ \n\x00\xff0"])


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), LETTERS), min_size=1, max_size=3))
def test_a_text_with_other_characters_is_read_as_the_decoding_has_it(changes: list[tuple[int, bytes]]) -> None:
    text = SOUND
    for place, letter in changes:
        text = text[:place] + letter + text[place + 1 :]
    try:
        expected = np.frombuffer(base64.b64decode(text, validate=True), "<i4").tolist()
    except ValueError:
        expected = [-1]
    found = read_small(memoryview(text), 255)
    if min(expected) >= 0 and max(expected) < 255:
        assert found is not None
        assert found.tolist() == expected
    else:
        assert found is None
