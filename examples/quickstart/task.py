"""The quickstart's task: additions of three-digit numbers, and two procedural teachers that write out how they add.

A problem is a string such as ``478+964=``. Both teachers end with ``####`` and the sum. Before it each writes its own
kind of reasoning. Each has a bias, a mistake that it always makes in the same situation:

* ``columns`` works from the right, one column at a time, with the carry: ``8+4=12,7+6+1=14,4+9+1=14####1442``. Its
  traces are long. It believes that 9+9+1 is 18.
* ``glance`` writes the sums of all columns from the left and then the answer: ``13,13,12####1442``. Its traces are
  short. It looks for a carry only one column to the right, and so loses a carry that passes through a column whose sum
  is nine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_dypo.fs import new_file

T = TypeVar("T")

ANSWER_MARK = "####"
NUM_DIGITS = 3
"""Digits of each number."""
MAX_DRAWS = 1000
"""Most random draws for each wanted problem. The rarest kind, without a carry, is one in seven."""


@dataclass(frozen=True)
class Addition:
    """Two numbers to be added."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> int:
        return self.first + self.second

    @property
    def num_carries(self) -> int:
        """Return the number of columns that pass on a carry: the more, the more difficult the problem."""
        carry = count = 0
        for upper, lower in self.columns():
            carry = (upper + lower + carry) // 10
            count += carry
        return count

    def columns(self) -> list[tuple[int, int]]:
        """Return pairs of digits, the ones first."""
        pairs = zip(str(self.first), str(self.second), strict=True)
        return [(int(upper), int(lower)) for upper, lower in pairs][::-1]


def add_by_columns(problem: Addition) -> str:
    """Write the trace of the teacher ``columns``."""
    steps, digits, carry = [], [], 0
    for upper, lower in problem.columns():
        total = 18 if (upper, lower, carry) == (9, 9, 1) else upper + lower + carry
        steps.append(f"{upper}+{lower}+{carry}={total}" if carry else f"{upper}+{lower}={total}")
        carry, digit = divmod(total, 10)
        digits.append(digit)
    return _trace(steps, digits, carry)


def add_at_a_glance(problem: Addition) -> str:
    """Write the trace of the teacher ``glance``."""
    totals = [upper + lower for upper, lower in problem.columns()]
    carries = [0, *(total // 10 for total in totals)]
    digits = [(total + carry) % 10 for total, carry in zip(totals, carries, strict=False)]
    return _trace([str(total) for total in reversed(totals)], digits, carries[-1])


def _trace(steps: Iterable[str], digits: list[int], carry: int) -> str:
    """Join reasoning and answer; ``digits`` start with the ones."""
    answer = "".join(str(digit) for digit in reversed([*digits, carry] if carry else digits))
    return ",".join(steps) + ANSWER_MARK + answer


TEACHERS: Mapping[str, Callable[[Addition], str]] = {"columns": add_by_columns, "glance": add_at_a_glance}


def draw_problems(
    counts: Mapping[int, int], rng: random.Random, exclude: Iterable[Addition] = (), *, num_digits: int = NUM_DIGITS
) -> list[Addition]:
    """Draw different problems, ``counts[c]`` of them with c carries, and shuffle them; none is in ``exclude``.

    Raises ValueError if there are not that many.
    """
    low, high = 10 ** (num_digits - 1), 10**num_digits
    taken = set(exclude)
    drawn: list[Addition] = []
    for carries, count in counts.items():
        found = draw_distinct(
            lambda: Addition(rng.randrange(low, high), rng.randrange(low, high)),
            count,
            taken,
            accepts=lambda problem, carries=carries: problem.num_carries == carries,
        )
        if len(found) < count:
            raise ValueError(f"counts={dict(counts)}: found only {len(found)} additions with {carries} carries")
        drawn += found
    rng.shuffle(drawn)
    return drawn


def draw_distinct(
    draw: Callable[[], T], count: int, taken: set[T], *, accepts: Callable[[T], bool] = lambda _: True
) -> list[T]:
    """Draw ``count`` accepted values that are not in ``taken``, and add them to it; fewer if they are hard to find."""
    found: list[T] = []
    for _ in range(MAX_DRAWS * count):
        if len(found) == count:
            break
        value = draw()
        if accepts(value) and value not in taken:
            taken.add(value)
            found.append(value)
    return found


def write_problems(path: Path, problems: Iterable[Addition]) -> None:
    """Write prompt data (JSONL) with the traces of both teachers. The file appears once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for problem in problems:
            file.write(f"{json.dumps(prompt_row(problem))}\n".encode())


def prompt_row(problem: Addition) -> dict[str, object]:
    """Return one row of prompt data."""
    return {
        "id": problem.prompt.rstrip("="),
        "prompt": problem.prompt,
        "answer": str(problem.answer),
        "source": f"{problem.num_carries} carries",
        "traces": {name: teacher(problem) for name, teacher in TEACHERS.items()},
    }
