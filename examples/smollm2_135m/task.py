"""Additions of two-digit numbers, asked in words, and two teachers that write out how they add."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.fs import new_file

NUMBERS = range(10, 100)
WORDINGS = ("What is {} plus {}?", "Add {} and {}.", "What do {} and {} make together?")


@dataclass(frozen=True)
class Question:
    """Two numbers to be added, and the words that ask for their sum."""

    first: int
    second: int
    wording: str = WORDINGS[0]

    @property
    def text(self) -> str:
        return self.wording.format(self.first, self.second)

    @property
    def answer(self) -> int:
        return self.first + self.second


def add_tens_and_ones(question: Question) -> str:
    """Write the trace of the teacher ``tens_and_ones``.

    Example for 47 and 95: 40 + 90 = 130, 7 + 5 = 12, 130 + 12 = 142. The answer is 142.
    """
    (tens, ones), (more_tens, more_ones) = divmod(question.first, 10), divmod(question.second, 10)
    high, low = 10 * (tens + more_tens), ones + more_ones
    steps = f"{10 * tens} + {10 * more_tens} = {high}, {ones} + {more_ones} = {low}, {high} + {low} = {question.answer}"
    return f"{steps}. The answer is {question.answer}."


def add_in_two_steps(question: Question) -> str:
    """Write the trace of the teacher ``two_steps``.

    Example for 47 and 95: 47 + 90 = 137, 137 + 5 = 142. The answer is 142.
    """
    tens, ones = divmod(question.second, 10)
    half = question.first + 10 * tens
    steps = f"{question.first} + {10 * tens} = {half}, {half} + {ones} = {question.answer}"
    return f"{steps}. The answer is {question.answer}."


TEACHERS: Mapping[str, Callable[[Question], str]] = {"tens_and_ones": add_tens_and_ones, "two_steps": add_in_two_steps}


def draw_questions(counts: Sequence[int], rng: random.Random) -> list[list[Question]]:
    """Draw sets of ``counts`` questions. No two questions of all sets add the same two numbers in the same order.

    Raises:
        ValueError: there are not that many pairs of numbers.
    """
    pairs = [(first, second) for first in NUMBERS for second in NUMBERS]
    if sum(counts) > len(pairs):
        raise ValueError(f"counts={list(counts)}: there are only {len(pairs)} pairs of two-digit numbers")
    drawn = iter(rng.sample(pairs, sum(counts)))
    return [[Question(*next(drawn), rng.choice(WORDINGS)) for _ in range(count)] for count in counts]


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write prompt data (JSONL) with the traces of both teachers. The file appears once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for question in questions:
            file.write(f"{json.dumps(prompt_row(question))}\n".encode())


def prompt_row(question: Question) -> dict[str, object]:
    """Return one row of prompt data. Its prompt is a message; the model's own chat template renders it."""
    return {
        "id": f"{question.first}+{question.second}",
        "prompt": [{"role": "user", "content": question.text}],
        "answer": str(question.answer),
        "traces": {name: teacher(question) for name, teacher in TEACHERS.items()},
    }
