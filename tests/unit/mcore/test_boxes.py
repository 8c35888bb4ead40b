"""Chunks fill a tensor if each element is in exactly one of them, which counting shows."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_dypo.mcore.compat.boxes import Box, fill


def fill_by_counting(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    count = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for start, length in boxes:
        for at in itertools.product(*(range(a, a + b) for a, b in zip(start, length, strict=True))):
            count[at] += 1
    return set(count.values()) <= {1}


def cut_at_random(start: list[int], length: list[int], choose: random.Random) -> list[Box]:
    """Cut a box into boxes by planes through it, again and again."""
    axes = [axis for axis, size in enumerate(length) if size > 1]
    if not axes or choose.random() < 0.2:
        return [(start, length)]
    axis = choose.choice(axes)
    at = choose.randrange(1, length[axis])
    lower, upper, rest = length.copy(), start.copy(), length.copy()
    lower[axis], upper[axis], rest[axis] = at, start[axis] + at, length[axis] - at
    return cut_at_random(start, lower, choose) + cut_at_random(upper, rest, choose)


@pytest.mark.parametrize("seed", range(300))
def test_boxes_fill_a_shape_as_counting_says(seed: int) -> None:
    choose = random.Random(seed)
    shape = [choose.randrange(1, 6) for _ in range(choose.randrange(4))]
    boxes = cut_at_random([0] * len(shape), shape, choose)
    assert fill(boxes, shape)
    assert fill_by_counting(boxes, tuple(shape))
    if shape:
        start, length = map(list, choose.choice(boxes))
        moved = [choose.randrange(size - part + 1) for size, part in zip(shape, length, strict=True)]
        boxes[boxes.index((start, length))] = (moved, length)
        assert fill(boxes, shape) == fill_by_counting(boxes, tuple(shape))


def test_boxes_that_no_plane_parts_are_compared_in_pairs() -> None:
    """Four boxes around a middle one."""
    boxes: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert fill(boxes, (3, 3))
    assert not fill([*boxes[:4], ((0, 1), (1, 1))], (3, 3))


def test_a_shape_without_elements_is_filled_by_nothing() -> None:
    assert fill([], (0, 3))
    assert fill([((0, 0), (0, 3))], (0, 3))
    assert fill([((), ())], ())
    assert not fill([], ())
