"""Boxes of whole numbers: whether chunks fill a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Box = tuple[Sequence[int], Sequence[int]]
"""Start and length on each axis."""


def fill(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Tell whether boxes within a shape fill it, each element once."""
    volumes = [math.prod(length) for _, length in boxes]
    if sum(volumes) != math.prod(shape):
        return False
    return _are_disjoint([box for box, volume in zip(boxes, volumes, strict=True) if volume > 0], len(shape))


def _are_disjoint(boxes: list[Box], num_axes: int) -> bool:
    """Tell whether no two boxes overlap, by cutting groups of them apart; what no cut parts is compared in pairs."""
    groups = [boxes]
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        cuts = (_cut(group, axis) for axis in range(num_axes))
        parts = next((parts for parts in cuts if len(parts) > 1), None)
        if parts is not None:
            groups += parts
        elif any(_overlap(one, other) for one, other in itertools.combinations(group, 2)):
            return False
    return True


def _cut(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Part boxes wherever a plane across ``axis`` cuts through none of them."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        start, length = box[0][axis], box[1][axis]
        if start >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, start + length)
    return parts


def _overlap(one: Box, other: Box) -> bool:
    pairs = zip(*one, *other, strict=True)
    return all(start < before + size and before < start + length for start, length, before, size in pairs)
