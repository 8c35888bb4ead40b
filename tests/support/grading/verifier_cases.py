"""Handwritten cases for the verifiers, and the page that shows them.

``python -m tests.support.grading.verifier_cases`` writes the table into docs/verifiers.md.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from megatron_dypo.grading.choice import verify_choice
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.grading.math import verify_math

VERIFIERS = {"math": verify_math, "exact": verify_exact, "choice": verify_choice}
CASES: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "unit" / "grading" / "data" / "cases.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
PAGE = Path(__file__).parents[3] / "docs" / "verifiers.md"
BEGIN = "<!-- cases: written by python -m tests.support.grading.verifier_cases -->\n"
END = "<!-- end of cases -->\n"


def table() -> str:
    """Return the cases as Markdown, with one table for each verifier and rule."""
    parts = []
    for (verifier, about), rows in itertools.groupby(CASES, key=lambda case: (case["verifier"], case["about"])):
        parts.append(f"\n**{verifier}**: {about}\n\n| gold | accepted | refused |\n|---|---|---|\n")
        golds: dict[str, dict[bool, list[str]]] = {}
        for row in rows:
            golds.setdefault(row["gold"], {True: [], False: []})[row["verdict"]].append(_code(row["response"]))
        for gold, verdicts in golds.items():
            parts.append(f"| {_code(gold)} | {', '.join(verdicts[True])} | {', '.join(verdicts[False])} |\n")
    return "".join(parts) + "\n"


def page(text: str) -> str:
    """Return ``text`` of the page with the current table."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + table() + END + tail


def _code(text: str) -> str:
    shown = text.replace("|", "\\|").replace("\n", "⏎")
    return f"`{shown}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
