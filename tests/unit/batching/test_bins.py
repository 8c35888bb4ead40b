import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.batching.bins import bins_balanced, bins_best_fit, bins_within, dealt_bins

sizes = st.lists(st.integers(1, 40), min_size=0, max_size=40)
few = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def loads(values, bins):
    return [sum(values[i] for i in members) for members in bins]


def assert_each_once(values, bins):
    assert sorted(i for members in bins for i in members) == list(range(len(values)))


def smallest_maximum(costs, count):
    """Return the optimum, found by trying every assignment."""
    assignments = itertools.product(range(count), repeat=len(costs))
    return min(
        max(sum(c for c, a in zip(costs, where, strict=True) if a == b) for b in range(count)) for where in assignments
    )


@given(sizes, st.integers(1, 60))
def test_best_fit_places_each_once_within_the_capacity(sizes, capacity):
    bins = bins_best_fit(sizes, capacity)
    assert_each_once(sizes, bins)
    assert all(bins)
    for members in bins:
        assert sum(sizes[i] for i in members) <= capacity or len(members) == 1


@given(sizes, st.integers(40, 90))
def test_best_fit_takes_less_than_twice_the_volume(sizes, capacity):
    # Any two bins together hold more than the capacity. Otherwise the later bin would not have been opened.
    lower_bound = -(-sum(sizes) // capacity)
    assert lower_bound <= len(bins_best_fit(sizes, capacity)) <= max(2 * lower_bound - 1, 0)


@given(sizes, st.integers(1, 8))
def test_balanced_bins_differ_by_at_most_one_item(costs, count):
    bins = bins_balanced(costs, count)
    assert len(bins) == count
    assert_each_once(costs, bins)
    assert max(loads(costs, bins)) - min(loads(costs, bins)) <= max(costs, default=0)


@given(few, st.integers(1, 3))
def test_balanced_bins_keep_grahams_bound_against_the_optimum(costs, count):
    largest = max(loads(costs, bins_balanced(costs, count)))
    assert largest <= (4 / 3 - 1 / (3 * count)) * smallest_maximum(costs, count) + 1e-9


@given(sizes, st.integers(1, 8), st.integers(20, 400))
def test_bins_within_a_capacity_keep_it_and_hold_each_once(sizes, count, capacity):
    costs = [size**2 for size in sizes]
    bins = bins_within(costs, sizes, count=count, capacity=capacity)
    if bins is None:
        # An item is refused only when no bin has room for it.
        assert len(sizes) > count
        assert sum(sizes) + count * max(sizes) > count * capacity
        return
    assert len(bins) == count
    assert_each_once(sizes, bins)
    for members in bins:
        assert sum(sizes[i] for i in members) <= capacity or len(members) == 1


@given(sizes, st.integers(1, 8))
def test_a_capacity_that_never_binds_changes_nothing(costs, count):
    assert bins_within(costs, costs, count=count, capacity=sum(costs) + 1) == bins_balanced(costs, count)


@given(sizes, st.integers(1, 8), st.integers(40, 400), st.sampled_from([2.0**-80, 2.0**80]))
def test_the_unit_of_the_costs_changes_no_bin(sizes, count, capacity, unit):
    costs = [float(size**2) for size in sizes]
    scaled = [cost * unit for cost in costs]
    assert bins_balanced(scaled, count) == bins_balanced(costs, count)
    within = bins_within(costs, sizes, count=count, capacity=capacity)
    assert bins_within(scaled, sizes, count=count, capacity=capacity) == within


@given(sizes, st.integers(1, 8), st.integers(40, 60))
def test_partitions_are_the_same_each_time(sizes, count, capacity):
    for partition in (
        lambda: bins_best_fit(sizes, capacity),
        lambda: bins_balanced(sizes, count),
        lambda: bins_within(sizes, sizes, count=count, capacity=capacity),
    ):
        assert partition() == partition()


def test_an_item_beyond_the_capacity_is_alone():
    assert sorted(bins_best_fit([9, 2, 2], 4)) == [[0], [1, 2]]
    assert bins_within([9.0, 2.0, 2.0], [9, 2, 2], count=2, capacity=4) == [[0], [1, 2]]
    assert bins_within([9.0, 2.0, 2.0], [9, 2, 2], count=1, capacity=4) is None


@pytest.mark.parametrize("count", [20, 40])
def test_a_full_light_bin_gives_way_to_the_emptiest_one(count):
    # Large cheap items fill bins that remain the lightest. The rest must go to bins other than those few.
    sizes, costs = [100] * (count - 1) + [10] * 10, [1.0] * (count - 1) + [0.5] * 10
    bins = bins_within(costs, sizes, count=count, capacity=100)
    assert bins is not None
    assert sorted(loads(sizes, bins)) == [100] * count


def test_room_that_fits_exactly_is_used():
    assert bins_best_fit([3, 2], 5) == [[0, 1]]
    assert bins_best_fit([4, 3, 2, 1], 5) == [[0, 3], [1, 2]]


def test_an_item_beyond_the_capacity_gets_no_bin_that_holds_another():
    assert bins_within([5.0, 1.0], [2, 9], count=1, capacity=4) is None, (
        "the cheap one comes last, and is the large one"
    )
    assert bins_within([5.0, 1.0], [2, 9], count=2, capacity=4) == [[0], [1]]


@given(st.lists(st.floats(0, 100), max_size=400), st.integers(1, 8))
def test_dealt_bins_hold_each_once_and_differ_by_little(costs, count):
    bin_of = dealt_bins(np.array(costs), count)
    bins = [[i for i, slot in enumerate(bin_of.tolist()) if slot == one] for one in range(count)]
    assert_each_once(costs, bins)
    if len(costs) <= 16 * count:
        assert sorted(map(tuple, bins)) == sorted(tuple(sorted(one)) for one in bins_balanced(costs, count))
    else:
        assert max(loads(costs, bins)) - min(loads(costs, bins)) <= max(costs) + 1e-6


def test_many_lengths_of_rollouts_are_dealt_as_evenly_as_one_by_one():
    costs = np.clip(np.random.default_rng(0).lognormal(8, 0.8, 64 * 1024), 200, 8192).round()
    dealt = np.bincount(dealt_bins(costs, 64), weights=costs)
    assert dealt.max() / dealt.mean() - 1 <= 1e-3
