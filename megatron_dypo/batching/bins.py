"""Partitions of items, which have a cost and perhaps a size, into bins. Pure, deterministic, about O(n log n).

A bin is a list of indices into the items.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

_ONE_BY_ONE = 16
"""Items for each bin that are placed one by one before the rest is dealt."""
_TRIES = 16
"""Number of lightest bins that are tried before the emptiest one."""


def bins_best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the bins of best-fit decreasing, each of at most ``capacity``. There are at most 11/9 of the fewest, plus
    4.

    An item larger than ``capacity`` gets its own bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in _largest_first(sizes):
        at = bisect.bisect_left(rooms, (sizes[index], -1))
        if at < len(rooms):
            room, slot = rooms.pop(at)
        else:
            room, slot = capacity, len(bins)
            bins.append([])
        bins[slot].append(index)
        bisect.insort(rooms, (room - sizes[index], slot))
    return bins


def bins_balanced(costs: Sequence[float], count: int) -> list[list[int]]:
    """Return ``count`` bins of roughly equal cost: largest item first into the lightest bin (Graham's LPT, 4/3 of the
    optimum)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, slot) for slot in range(count)]
    for index in _largest_first(costs):
        load, slot = loads[0]
        bins[slot].append(index)
        heapq.heapreplace(loads, (load + costs[index], slot))
    return bins


def dealt_bins(costs: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Return the bin of each item, for ``count`` bins of roughly equal cost, in time for very many items.

    The largest items go one by one into the lightest bin, as in :func:`bins_balanced`, 16 for each bin. The rest is
    dealt in blocks: of each ``count`` next items the largest goes into the lightest bin, the next into the second.
    """
    order = np.argsort(-costs, kind="stable")
    first = order[: _ONE_BY_ONE * count]
    bin_of = np.empty(len(costs), np.int64)
    loads = np.zeros(count)
    for slot, members in enumerate(bins_balanced(costs[first].tolist(), count)):
        bin_of[first[members]] = slot
        loads[slot] = costs[first[members]].sum()
    for start in range(len(first), len(order), count):
        items = order[start : start + count]
        lightest = np.argsort(loads, kind="stable")[: len(items)]
        bin_of[items] = lightest
        loads[lightest] += costs[items]
    return bin_of


def bins_within(costs: Sequence[float], sizes: Sequence[int], *, count: int, capacity: int) -> list[list[int]] | None:
    """Return ``count`` bins of roughly equal cost and at most ``capacity`` in size. A larger item gets its own bin.

    The item with the largest cost goes first into the lightest bin, or into the emptiest one if the lightest bins are
    full. Return None if some item finds no room; more bins may then help.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, rooms = _Queue([0.0] * count), _Queue([float(-capacity)] * count)  # rooms are negative: most room first
    for index in _largest_first(costs):
        fits = partial(_fits, sizes[index], rooms.values, capacity)
        slot = loads.first(fits, _TRIES)
        if slot is None:
            slot = rooms.first(fits, 1)
        if slot is None:
            return None
        bins[slot].append(index)
        loads.add(slot, costs[index])
        rooms.add(slot, sizes[index])
    return bins


def _fits(size: int, rooms: Sequence[float], capacity: int, slot: int) -> bool:
    return size <= -rooms[slot] or (size > capacity and rooms[slot] == -capacity)


class _Queue:
    """A value for each bin, and the bins in the order of their values."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self._heap = [(value, slot) for slot, value in enumerate(values)]

    def first(self, is_wanted: Callable[[int], bool], tries: int) -> int | None:
        """Return the first wanted bin among the ``tries`` smallest values."""
        seen: list[tuple[float, int]] = []
        found = None
        while found is None and self._heap and len(seen) < tries:
            value, slot = heapq.heappop(self._heap)
            if value == self.values[slot]:  # else the entry is outdated, and the bin has a newer one
                seen.append((value, slot))
                found = slot if is_wanted(slot) else None
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return found

    def add(self, slot: int, amount: float) -> None:
        """Add to the value of one bin."""
        self.values[slot] += amount
        heapq.heappush(self._heap, (self.values[slot], slot))


def _largest_first(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))
