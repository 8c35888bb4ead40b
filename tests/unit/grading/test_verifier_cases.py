"""Each built-in verifier accepts and refuses what the rows of docs/verifiers.md say."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dypo.grading.answers.style import AnswerStyle
from tests.support.grading.verifier_cases import CASES, PAGE, VERIFIERS, page


@pytest.mark.parametrize("case", CASES, ids=[f"{case['verifier']}-{index}" for index, case in enumerate(CASES)])
def test_a_verdict_is_the_one_that_the_page_shows(case: dict[str, Any]) -> None:
    style = AnswerStyle(**case.get("style", {}))
    assert VERIFIERS[case["verifier"]](case["response"], case["gold"], style) is case["verdict"]


def test_the_page_shows_these_cases() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run: python -m tests.support.grading.verifier_cases"


def test_each_verifier_has_cases_of_both_verdicts_for_each_rule() -> None:
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for case in CASES:
        verdicts.setdefault((case["verifier"], case["about"]), set()).add(case["verdict"])
    assert all(len(seen) == 2 for seen in verdicts.values())
