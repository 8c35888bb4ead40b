"""The answer that a response states, as majorities count it."""

from __future__ import annotations

import pytest

from megatron_dypo.grading.stated import stated_answer, states_answers


@pytest.mark.parametrize(
    ("verifier", "responses", "answer"),
    [
        ("math", ["\\boxed{0.5}", "so it is \\boxed{\\frac{1}{2}}", "The answer is 1/2.", "\\boxed{\\dfrac12}"], "1/2"),
        ("math", ["\\boxed{1,000}", "\\boxed{1000}", "#### 1000", "x = \\boxed{1000.0}"], "1000"),
        ("math", ["\\boxed{(x+1)^2}", "\\boxed{ (x+1)^2 }"], "(x+1)^2"),
        ("exact", ["\\boxed{Paris}", "The answer is paris.", "<answer>Paris</answer>"], "paris"),
        ("choice", ["\\boxed{B}", "The answer is (B).", "B"], "B"),
    ],
)
def test_one_answer_has_one_text(verifier: str, responses: list[str], answer: str) -> None:
    gold = "C" if verifier == "choice" else "7"
    assert {stated_answer(verifier, response, gold) for response in responses} == {answer}


@pytest.mark.parametrize("verifier", ["math", "exact", "choice"])
def test_different_answers_stay_different_and_none_is_none(verifier: str) -> None:
    gold = "C" if verifier == "choice" else "7"
    assert stated_answer(verifier, "\\boxed{A}", gold) != stated_answer(verifier, "\\boxed{B}", gold)
    assert stated_answer(verifier, "", gold) is None


def test_digits_label_options_where_the_answer_is_one() -> None:
    assert stated_answer("choice", "The answer is 3.", "2") == "3"


def test_a_verifier_of_the_user_s_own_states_no_answers() -> None:
    assert not states_answers("my.module:f")
    assert stated_answer("my.module:f", "\\boxed{1}", "1") is None
    assert stated_answer("math", "\\boxed{1}", {"value": 1}) is None
