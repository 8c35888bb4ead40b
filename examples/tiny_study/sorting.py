"""Task B: put the letters of a word into alphabetical order. The answer is a word.

``sort dbca=`` has the answer ``abcd``. Three teachers write how they sort:

* ``insertion`` puts one letter after the other into its place: ``d,bd,bcd,abcd####abcd``. It believes that j comes
  before i.
* ``ranks`` writes the place of each letter and then the answer: ``4,2,3,1####abcd``. Its traces are short. It believes
  that l comes before k.
* ``clumsy`` is the option for the study of bias: its words on the way have their first two letters swapped, and its
  answer is right.

The letters of a word are all different.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
from task import ANSWER_MARK, draw_distinct

Rows = list[dict[str, object]]

LETTERS = "abcdefghijklmnop"
INSERTION_ORDER = "abcdefghjiklmnop"
RANKS_ORDER = "abcdefghijlkmnop"
"""The alphabet as the two teachers believe it to be."""
PROMPT, PHRASING = "sort {}=", "order of {}="
"""The usual phrasing, and the other one."""
VALIDATION = {3: 20, 4: 40, 5: 70, 6: 70}
HELDOUT = {3: 20, 4: 40, 5: 70, 6: 70}
PHRASED = {3: 10, 4: 20, 5: 35, 6: 35}
TRAIN = {3: 400, 4: 800, 5: 1400, 6: 1400}
LONGER = {7: 100}
WARMUP = {3: 600, 4: 12000}
WARMUP_PHRASED = {3: 300, 4: 2700}
"""Length of the words → number of words. The warm start has words of three and four letters, training of up to six."""


def insert_letters(word: str) -> str:
    """Write the trace of the teacher ``insertion``."""
    steps = ["".join(sorted(word[:count], key=INSERTION_ORDER.index)) for count in range(1, len(word) + 1)]
    return f"{','.join(steps)}{ANSWER_MARK}{steps[-1]}"


def rank_letters(word: str) -> str:
    """Write the trace of the teacher ``ranks``."""
    answer = "".join(sorted(word, key=RANKS_ORDER.index))
    return f"{','.join(str(answer.index(letter) + 1) for letter in word)}{ANSWER_MARK}{answer}"


def insert_clumsily(word: str) -> str:
    """Write the trace of the teacher ``clumsy``."""
    steps = ["".join(sorted(word[:count])) for count in range(1, len(word) + 1)]
    return f"{','.join(step[1::-1] + step[2:] for step in steps)}{ANSWER_MARK}{answer_of(word)}"


def answer_of(word: str) -> str:
    """Return the letters of a word in alphabetical order."""
    return "".join(sorted(word))


TEACHERS: Mapping[str, Callable[[str], str]] = {
    "insertion": insert_letters,
    "ranks": rank_letters,
    "clumsy": insert_clumsily,
}


def draw_words(counts: Mapping[int, int], rng: random.Random, exclude: Iterable[str] = ()) -> list[str]:
    """Draw different words, ``counts[n]`` of them with n letters, and shuffle them; none is in ``exclude``.

    Raises:
        ValueError: there are not that many.
    """
    taken = set(exclude)
    drawn: list[str] = []
    for length, count in counts.items():
        found = draw_distinct(lambda length=length: "".join(rng.sample(LETTERS, length)), count, taken)
        if len(found) < count:
            raise ValueError(f"counts={dict(counts)}: found only {len(found)} words of {length} letters")
        drawn += found
    rng.shuffle(drawn)
    return drawn


def rows_of(words: Iterable[str], *, is_phrased: bool = False) -> Rows:
    """Return rows of prompt data with the traces of three teachers."""
    return [
        {
            "id": f"{word} in words" if is_phrased else word,
            "prompt": (PHRASING if is_phrased else PROMPT).format(word),
            "answer": answer_of(word),
            "source": f"{len(word)} letters",
            "traces": {name: teacher(word) for name, teacher in TEACHERS.items()},
        }
        for word in words
    ]


def draw_rows(seed: int) -> Mapping[str, Rows]:
    """Draw every set of the task. No word stands twice, neither in two sets nor in one."""
    rng = random.Random(seed)
    taken: list[str] = []

    def draw(counts: Mapping[int, int]) -> list[str]:
        drawn = draw_words(counts, rng, exclude=taken)
        taken.extend(drawn)
        return drawn

    sets = {name: rows_of(draw(counts)) for name, counts in (("validation", VALIDATION), ("heldout", HELDOUT))}
    sets["longer"] = rows_of(draw(LONGER))
    sets["phrasing"] = rows_of(draw(PHRASED), is_phrased=True)
    sets["train"] = rows_of(draw(TRAIN))
    warmup = rows_of(draw(WARMUP)) + rows_of(draw(WARMUP_PHRASED), is_phrased=True)
    rng.shuffle(warmup)
    return {**sets, "warmup": warmup}
