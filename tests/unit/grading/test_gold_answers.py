"""The gold answers of five public benchmarks, each compared with itself and with those of other rows.

``DYPO_DATA`` names the folder with gsm8k_test.jsonl, math500_test.jsonl, aime24.jsonl, aime25.jsonl, amc23_83.jsonl and
arc_c.parquet; these files are not shipped.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_dypo.grading.answers.cleaning import cleaned
from megatron_dypo.grading.answers.extract import gold_text
from megatron_dypo.grading.answers.reading import Formula, Quantity, read_answer
from megatron_dypo.grading.answers.same import same_answer
from megatron_dypo.grading.choice import verify_choice
from megatron_dypo.grading.math import verify_math

pytestmark = pytest.mark.slow

FILES = ("gsm8k_test.jsonl", "math500_test.jsonl", "aime24.jsonl", "aime25.jsonl", "amc23_83.jsonl")
NUM_SAMPLED = 300
EQUAL_LISTS = {frozenset(("-2,1", "1,-2"))}
"""Two rows of MATH-500 have the same roots."""


@pytest.fixture
def folder() -> Path:
    path = Path(os.environ.get("DYPO_DATA", ""))
    if "DYPO_DATA" not in os.environ or not path.is_dir():
        pytest.skip("DYPO_DATA names no folder with the benchmarks' files")
    return path


def _answers(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["answer"] for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_each_raw_answer_field_of_gsm8k_is_right_by_its_own_last_number(folder: Path) -> None:
    answers = _answers(folder, "gsm8k_test.jsonl")
    for answer in answers:
        last = answer.rsplit("####", 1)[1].strip()
        assert verify_math(last, answer)
        assert verify_math(f"So it is {last}.", answer)
        assert verify_math(answer, answer)
        assert verify_math(answer, last)
        number = int(last.replace(",", ""))
        assert not verify_math(f"So it is {number + 1}.", answer)
        assert verify_math(f"So it is {number:,}.", answer)
    assert len(answers) == 1319


def test_each_solution_of_math_500_states_its_answer_and_no_other_rows(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "math500_test.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = [row["answer"] for row in rows if not verify_math(row["solution"], row["answer"])]
    assert wrong == ["\\frac{639}{40}"]  # the row boxes the mixed number too, joined by "or"
    choice = random.Random(0)
    for _ in range(NUM_SAMPLED):
        row, other = choice.sample(rows, 2)
        assert row["answer"] == other["answer"] or not verify_math(row["solution"], other["answer"])


def test_no_gold_is_right_for_another_rows_gold_unless_they_are_the_same_number(folder: Path) -> None:
    golds = sorted({gold_text(answer) for name in FILES for answer in _answers(folder, name)})
    read = {gold: read_answer(cleaned(gold)) for gold in golds}
    asked: list[tuple[str, str]] = []
    accepted = set()
    for gold, claim in itertools.permutations(golds, 2):
        a, b = read[gold], read[claim]
        if isinstance(a, Quantity) and isinstance(b, Quantity):
            is_same = same_answer(gold, claim, _never) if _near(a, b) else False
            assert is_same is (a.number.value == b.number.value), (gold, claim)
        elif isinstance(a, Formula | Quantity) and isinstance(b, Formula | Quantity):
            asked.append((gold, claim))
        elif same_answer(gold, claim, _never):
            accepted.add(frozenset((gold, claim)))
    assert accepted == EQUAL_LISTS
    for gold, claim in random.Random(0).sample(asked, min(NUM_SAMPLED, len(asked))):
        assert not verify_math(f"\\boxed{{{claim}}}", gold), (gold, claim)


def _never(gold: str, claim: str) -> bool:
    return False


def _near(a: Quantity, b: Quantity) -> bool:
    """Return False for numbers that are far apart, unless one is a hundredth of the other: they need no comparison."""
    x, y = a.number.value, b.number.value
    return abs(x - y) < 1 or "%" in a.text + b.text or a.unit != b.unit


def test_each_label_of_arc_is_right_for_itself_only(folder: Path) -> None:
    golds = [row["reward_model"]["ground_truth"] for row in pq.read_table(folder / "arc_c.parquet").to_pylist()]
    assert sum(gold.isdigit() for gold in golds) == 22
    labels = sorted(set(golds))
    assert all(re.fullmatch("[A-D1-4]", label) for label in labels)
    for form in (
        "\\boxed{{{}}}",
        "\\boxed{{\\text{{({})}}}}",
        "The answer is {}.",
        "<answer>{}</answer>",
        "Answer: **{}**",
        "({})",
    ):
        for gold, claim in itertools.product(labels, repeat=2):
            assert verify_choice(form.format(claim), gold) is (gold == claim), (form, gold, claim)
