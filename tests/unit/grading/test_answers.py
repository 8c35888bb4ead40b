"""Answers in words: math, exact match, multiple choice."""

from __future__ import annotations

import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.answers.extract import last_boxed
from megatron_dypo.grading.choice import chosen_letter, verify_choice
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.grading.math import verify_math
from megatron_dypo.grading.verify import Verifier

MATH_500 = [
    "\\left( 3, \\frac{\\pi}{2} \\right)",
    "p - q",
    "\\frac{14}{3}",
    "\\text{Evelyn}",
    "10080",
    "-\\frac{2}{3}, \\frac{1}{2}",
    "6 - 5i",
    "[-2,7]",
    "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
    "(3,4]",
    "x^5 - x^4 + x^3 - x^2 + x - 1",
    "11\\sqrt2",
    "90^\\circ",
    "\\$32,\\!348",
    "1 \\pm \\sqrt{19}",
]
"""Answers in the forms of MATH-500 (Hendrycks et al., MATH, MIT licence)."""

GSM8K = [
    (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
        "72",
    ),
    ("Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nShe earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10", "10"),
    ("The fee is $4.00 + $2.00 = $<<4+2=6.00>>6.00\n#### 6", "6"),
    ("32 / 96 * 100% = 33.333...%, which rounds down to 33%\n#### 33", "33"),
    ("It costs 1,000 * 1.5 = $<<1000*1.5=1500>>1,500.\n#### 1,500", "1500"),
]
"""Answers in the form of GSM8K's solutions (Cobbe et al., MIT licence)."""


@pytest.mark.parametrize("gold", MATH_500)
def test_a_gold_answer_of_math_500_equals_itself(gold: str) -> None:
    assert verify_math(f"So the answer is $\\boxed{{{gold}}}$.", gold)
    assert not verify_math("So the answer is $\\boxed{123456}$.", gold)


@pytest.mark.parametrize(("solution", "answer"), GSM8K)
def test_a_solution_of_gsm8k_has_its_own_answer(solution: str, answer: str) -> None:
    assert verify_math(solution, answer)
    assert not verify_math(solution, f"{answer}1")


@pytest.mark.parametrize(
    ("response", "answer", "is_correct"),
    [
        ("First \\boxed{2}. No: \\boxed{3}", "3", True),
        ("First \\boxed{2}. No: \\boxed{3}", "2", False),
        ("\\boxed{1/2^{99}}", "1/2^{98}", False),
        ("the answer is $\\frac{1}{2^{99}}$", "\\frac{1}{2^{98}}", False),
        ("the answer is $\\frac{1}{2^{99}}$", "\\frac{1}{2^{99}}", True),
        ("\\boxed{1.602 \\times 10^{-19}}", "1.602e-19", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{x=5}", "5", True),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", True),
        ("\\boxed{3\\text{ cm}}", "3", True),
        ("\\boxed{4}", "\\boxed{4}", True),
        ("The total is 5 + 13 = 18", "18", True),
        ("I do not know.", "18", False),
        ("", "18", False),
        ("\\boxed{}", "18", False),
        ("\\boxed{18", "19", False),
        ("The answer is 12. " + "Filler. " * 1000 + "The answer is 13.", "12", False),
    ],
)
def test_math(response: str, answer: str, is_correct: bool) -> None:
    assert verify_math(response, answer) is is_correct


def test_an_endless_tower_costs_one_sample() -> None:
    pairs = [(f"\\boxed{{{i}\\sqrt{{2}}}}", f"\\sqrt{{{2 * i * i}}}") for i in range(12)]
    pairs[5] = ("\\boxed{9^{9^{9^9}}}", "3")
    with Verifier(GradingConfig(workers=2)) as verifier:
        verdicts = verifier.verify(pairs)
    assert [v.is_correct for v in verdicts] == [i != 5 for i in range(12)]
    assert verdicts[5].error == "no verdict within 2 s of processor time"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{\\frac{1}{2}} then", "\\frac{1}{2}"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\fbox { a{b}c }", "a{b}c"),
        ("boxed{1}", None),
    ],
)
def test_the_last_balanced_box_counts(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "answer", "is_correct"),
    [
        ("Thinking.\nParis", "paris", True),
        ("Thinking.\n**Paris.**\n\n", "Paris", True),
        ("The answer is  New   York.", "new york", True),
        ("Answer: 1,234", "1234", False),
        ("The answer is 4\nThe answer is 5\nbye", "5", True),
        ("\\boxed{ yes } (the answer is no)", "Yes", True),
        ("work\n#### 72", "72", True),
        ("ＡＢ", "ab", True),
        ("not Paris", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_exact(response: str, answer: str, is_correct: bool) -> None:
    assert verify_exact(response, answer) is is_correct


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("So the answer is (B).", "B"),
        ("the answer is (b)", "B"),
        ("The correct answer is B", "B"),
        ("Answer: **C**", "C"),
        ("Answer: C. Because it is cold.", "C"),
        ("The answer is A because it rains.", "A"),
        ("The answer is a mystery", None),
        ("The answer is A mystery to me, I think", None),
        ("The answer is (A). Wait, the answer is (D).", "D"),
        ("I choose option D.", "D"),
        ("The answer is option C", "C"),
        ("The answer is \\text{(E)}", "E"),
        ("Therefore $\\boxed{B}$", "B"),
        ("Therefore \\boxed{\\text{(C)}}; the answer is (A)", "C"),
        ("\\boxed{d) water}", "D"),
        ("\\boxed{42}", None),
        ("It melts.\nB", "B"),
        ("It melts.\nB. Water", "B"),
        ("A: ice\nB: water\n\n(C)", "C"),
        ("Because of this.", None),
        ("I think it melts.", None),
        ("", None),
    ],
)
def test_the_chosen_letter(response: str, letter: str | None) -> None:
    assert chosen_letter(response) == letter
    for gold in "ABCDE":
        assert verify_choice(response, gold) is (gold == letter)


@pytest.mark.parametrize("answer", ["B", "(B)", "b.", " B) "])
def test_a_gold_letter_may_be_written_in_these_ways(answer: str) -> None:
    assert verify_choice("The answer is (B)", answer)


def test_a_gold_answer_that_is_no_letter_is_refused() -> None:
    with pytest.raises(ValueError, match="'Paris': must be one letter"):
        verify_choice("B", "Paris")
