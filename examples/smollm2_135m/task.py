"""Additions of two-digit numbers, asked in words, and two teachers that write out how they add."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOW, HIGH = 10, 100
"""Range of the numbers: two digits."""
QUESTIONS = ("What is {0} plus {1}?", "Add {0} and {1}.", "What do {0} and {1} make together?")


@dataclass(frozen=True)
class Question:
    """Two numbers to be added, and how that is asked."""

    first: int
    second: int
    wording: int = 0

    @property
    def text(self) -> str:
        return QUESTIONS[self.wording].format(self.first, self.second)

    @property
    def answer(self) -> int:
        return self.first + self.second


def add_tens_and_ones(question: Question) -> str:
    """Write the trace of the teacher ``tens_and_ones``."""
    (tens, ones), (more_tens, more_ones) = divmod(question.first, 10), divmod(question.second, 10)
    high, low = 10 * (tens + more_tens), ones + more_ones
    steps = f"{10 * tens} + {10 * more_tens} = {high}, {ones} + {more_ones} = {low}, {high} + {low} = {question.answer}"
    return f"{steps}. The answer is {question.answer}."


def add_in_two_steps(question: Question) -> str:
    """Write the trace of the teacher ``two_steps``: first the tens of the second number, then its ones."""
    tens, ones = divmod(question.second, 10)
    half = question.first + 10 * tens
    steps = f"{question.first} + {10 * tens} = {half}, {half} + {ones} = {question.answer}"
    return f"{steps}. The answer is {question.answer}."


TEACHERS: Mapping[str, Callable[[Question], str]] = {"tens_and_ones": add_tens_and_ones, "two_steps": add_in_two_steps}


def draw_questions(counts: Sequence[int], rng: random.Random) -> list[list[Question]]:
    """Draw sets of ``counts`` questions; no two of them, in all sets, add the same two numbers.

    Raises:
        ValueError: there are not that many pairs of numbers.
    """
    pairs = [(first, second) for first in range(LOW, HIGH) for second in range(LOW, HIGH)]
    if sum(counts) > len(pairs):
        raise ValueError(f"counts={list(counts)}: there are only {len(pairs)} pairs of two-digit numbers")
    drawn = iter(rng.sample(pairs, sum(counts)))
    return [[Question(*next(drawn), wording=rng.randrange(len(QUESTIONS))) for _ in range(count)] for count in counts]


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write prompt data (JSONL) with the traces of both teachers; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row(question)) + "\n" for question in questions), encoding="utf-8")
    part.replace(path)


def row(question: Question) -> dict[str, object]:
    """Return one row of prompt data: a message, so that the model's own chat template makes the prompt."""
    return {
        "id": f"{question.first}+{question.second}",
        "prompt": [{"role": "user", "content": question.text}],
        "answer": str(question.answer),
        "traces": {name: teacher(question) for name, teacher in TEACHERS.items()},
    }
