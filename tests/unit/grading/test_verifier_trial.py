"""Verifiers tried before a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.trial import check_importable, try_verifier
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.types import Prompt

HERE = "tests.support.grading.verifiers"


def _prompt(answer: Any, **changes: Any) -> Prompt:
    nothing = np.zeros(0, np.int32)
    return Prompt(
        **{
            **{
                "prompt_id": "7",
                "visit": 0,
                "order": 0,
                "tokens": nothing,
                "text": "?",
                "answer": answer,
                "source": "",
            },
            **changes,
        }
    )


def _tried(cfg: GradingConfig, *prompts: Prompt) -> list[str]:
    with Verifier(cfg) as verifier:
        return try_verifier(verifier, cfg, prompts)


@pytest.mark.parametrize(
    ("verifier", "answer"),
    [("math", "3/4"), ("math", "\\frac{1}{2}"), ("exact", "Paris"), ("choice", "B"), (f"{HERE}:obedient", "x")],
)
def test_a_verifier_that_accepts_the_gold_answer_has_no_problem(verifier: str, answer: str) -> None:
    assert _tried(GradingConfig(verifier=verifier, workers=1), _prompt(answer)) == []


@pytest.mark.parametrize(
    ("function", "answer", "problem"),
    [
        ("always_true", "x", "it accepts an empty response: every rollout would be correct, every prompt Easy"),
        ("never_true", "x", "it refuses the row's own answer 'x', however it is stated: '"),
        ("wants_object", "x", "no verdict on the row's own answer 'x': TypeError: "),
    ],
)
def test_a_verifier_that_is_wrong_about_the_gold_answer_is_named(function: str, answer: str, problem: str) -> None:
    problems = _tried(GradingConfig(verifier=f"{HERE}:{function}", workers=1), _prompt(answer), _prompt(answer))
    assert len(problems) == 2
    assert all(text.startswith(f"prompt 7, verifier {HERE}:{function}: {problem}") for text in problems)


def test_an_object_as_the_gold_answer_need_not_be_stated() -> None:
    cfg = GradingConfig(verifier=f"{HERE}:wants_object", workers=1)
    assert _tried(cfg, _prompt({"tests": [1, 2]})) == []


def test_each_row_is_tried_with_its_own_verifier() -> None:
    cfg = GradingConfig(verifier=f"{HERE}:never_true", by_source={"letters": "choice"}, workers=1)
    prompts = [
        _prompt("B", source="letters"),
        _prompt("Paris", source="letters"),
        _prompt("Paris", verifier="exact"),
        _prompt("Paris", verifier="os:system"),
    ]
    problems = _tried(cfg, *prompts)
    assert [problem.split(":")[0] for problem in problems] == ["prompt 7, verifier choice", "prompt 7, verifier os"]
    assert "a row may name" in problems[1]


def test_a_module_that_is_missing_is_named_with_its_key() -> None:
    with pytest.raises(ValueError, match=r"^grading.verifier='no_such:f': cannot import no_such: No module named"):
        check_importable(GradingConfig(verifier="no_such:f"))
    check_importable(GradingConfig(verifier="choice"))


def test_an_import_that_takes_too_long_is_an_error() -> None:
    cfg = GradingConfig(verifier="tests.support.grading.hangs_on_import:f")
    with pytest.raises(ValueError, match=r"grading.verifier='.*': its import takes too long"):
        check_importable(cfg, deadline_s=1.0)
