"""Lengths of responses, and how they fill microbatches."""

import random

import pytest

from megatron_dypo.planning.lengths import sequences_per_microbatch, survival


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_the_mean_of_the_lengths_is_the_given_one(share):
    limit, points = 4096, 20_000
    mean = sum(survival(share * limit, limit, (i + 0.5) / points * limit) for i in range(points)) / points
    assert mean == pytest.approx(share, rel=1e-3)


def test_no_response_is_longer_than_the_limit_and_short_ones_are_exponential():
    assert survival(3000, 4000, 0) == pytest.approx(1)
    assert survival(3000, 4000, 4000) == 0
    assert survival(100, 10_000, 100) == pytest.approx(2.718281828**-1, rel=1e-3)


@pytest.mark.parametrize(("mean", "budget"), [(900, 4096), (3100, 4096), (2048, 16_384)])
def test_microbatches_hold_what_first_fit_packs_of_random_lengths(mean, budget):
    limit, draws = 4000, random.Random(3)
    grid = [(i + 0.5) / 2000 * limit for i in range(2000)]
    cumulative = [1 - survival(mean, limit, at) for at in grid]
    lengths = sorted((100 + grid[_first(cumulative, draws.random())] for _ in range(2000)), reverse=True)
    rooms: list[float] = []
    for length in lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(max(budget, length) - length)
        else:
            rooms[place] -= length
    assert sequences_per_microbatch(100, mean, limit, budget) == pytest.approx(len(lengths) / len(rooms), rel=0.05)


def test_equal_lengths_leave_room_that_no_sequence_fits_into():
    assert sequences_per_microbatch(1, 2047, 2047, 8192) == 4
    assert sequences_per_microbatch(1, 2047, 2047, 8000) == 3
    assert sequences_per_microbatch(100, 9000, 9000, 4096) == 1


def _first(cumulative, value):
    return next((i for i, at in enumerate(cumulative) if at >= value), len(cumulative) - 1)
