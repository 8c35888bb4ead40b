"""The lists that other projects test their graders with; see data/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.grading.choice import verify_choice
from megatron_dypo.grading.math import verify_math

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "public_cases.jsonl").read_text(encoding="utf-8").splitlines()
]
VERIFIERS = {"math": verify_math, "choice": verify_choice}


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_public_case_has_the_expected_verdict_or_the_one_that_we_give_a_reason_for(row: dict[str, Any]) -> None:
    verdict = VERIFIERS[row["verifier"]](row["response"], row["gold"])
    assert verdict is row.get("ours", row["expected"])


def test_we_agree_with_97_of_100_public_cases_and_give_a_reason_for_each_other() -> None:
    differing = [row for row in ROWS if "ours" in row]
    assert all(row["ours"] is not row["expected"] and row["reason"] for row in differing)
    assert len(differing) <= 0.03 * len(ROWS)
    assert len({row["name"] for row in ROWS}) == len(ROWS) >= 300
