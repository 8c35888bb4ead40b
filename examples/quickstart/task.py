"""The quickstart's task: additions of several digits, and two procedural teachers that write out how they add.

A problem is a string such as ``478+964=``. Both teachers end with ``####`` and the sum; before it each writes its own
kind of reasoning, and each has a bias, a mistake that it makes whenever the occasion arises:

* ``columns`` works from the right, one column at a time, with the carry: ``8+4=12,7+6+1=14,4+9+1=14####1442``.
  Long. It believes that 9+9+1 is 18.
* ``glance`` writes the sums of all columns from the left and then the answer: ``13,13,12####1442``. Short. It looks for
  a carry only one column to the right, and so loses a carry that passes through a column whose sum is nine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ANSWER_MARK = "####"


@dataclass(frozen=True)
class Addition:
    """Two numbers of the same length to be added."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> int:
        return self.first + self.second

    @property
    def num_digits(self) -> int:
        return len(str(self.first))

    def columns(self) -> list[tuple[int, int]]:
        """Pairs of digits, the ones first."""
        pairs = zip(str(self.first), str(self.second), strict=True)
        return [(int(upper), int(lower)) for upper, lower in pairs][::-1]


def add_by_columns(problem: Addition) -> str:
    """The trace of the teacher ``columns``."""
    steps, digits, carry = [], [], 0
    for upper, lower in problem.columns():
        total = 18 if (upper, lower, carry) == (9, 9, 1) else upper + lower + carry
        steps.append(f"{upper}+{lower}+{carry}={total}" if carry else f"{upper}+{lower}={total}")
        carry, digit = divmod(total, 10)
        digits.append(digit)
    return _trace(steps, digits, carry)


def add_at_a_glance(problem: Addition) -> str:
    """The trace of the teacher ``glance``."""
    totals = [upper + lower for upper, lower in problem.columns()]
    carries = [0, *(total // 10 for total in totals)]
    digits = [(total + carry) % 10 for total, carry in zip(totals, carries, strict=False)]
    return _trace([str(total) for total in reversed(totals)], digits, carries[-1])


def _trace(steps: Iterable[str], digits: list[int], carry: int) -> str:
    """Reasoning and answer; ``digits`` start with the ones."""
    answer = "".join(str(digit) for digit in reversed([*digits, carry] if carry else digits))
    return ",".join(steps) + ANSWER_MARK + answer


TEACHERS: Mapping[str, Callable[[Addition], str]] = {"columns": add_by_columns, "glance": add_at_a_glance}


def draw_problems(digits: Mapping[int, int], rng: random.Random, exclude: Iterable[Addition] = ()) -> list[Addition]:
    """Different problems, ``digits[n]`` of them with numbers of n digits, shuffled; none is in ``exclude``.

    Raises ValueError when there are not so many.
    """
    taken, drawn = set(exclude), []
    for num_digits, count in digits.items():
        low, high = 10 ** (num_digits - 1), 10**num_digits
        free = (high - low) ** 2 - sum(problem.num_digits == num_digits for problem in taken)
        if count > free:
            raise ValueError(f"digits={dict(digits)}: only {free} additions of {num_digits} digits are left to draw")
        wanted = len(taken) + count
        while len(taken) < wanted:
            problem = Addition(rng.randrange(low, high), rng.randrange(low, high))
            if problem not in taken:
                taken.add(problem)
                drawn.append(problem)
    rng.shuffle(drawn)
    return drawn


def write_problems(path: Path, problems: Iterable[Addition]) -> None:
    """Write prompt data (JSONL), with the traces of both teachers; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(prompt_row(problem)) + "\n")
    part.replace(path)


def prompt_row(problem: Addition) -> dict[str, object]:
    """One row of prompt data."""
    return {
        "id": problem.prompt.rstrip("="),
        "prompt": problem.prompt,
        "answer": str(problem.answer),
        "source": f"{problem.num_digits}-digit addition",
        "traces": {name: teacher(problem) for name, teacher in TEACHERS.items()},
    }
