"""Values confirm formulas that math-verify calls equal."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.grading.answers.formulas import is_confirmed, same_formula
from megatron_dypo.grading.answers.same import same_answer


@pytest.mark.parametrize(
    ("gold", "claim", "is_same"),
    [
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}", False),
        ("\\sqrt{2} \\cdot 10^{-9}", "\\sqrt{3} \\cdot 10^{-9}", False),
        ("\\sqrt{2}", "1.41421356", True),
        ("\\sqrt{2}", "1.4142", False),
        ("204_5", "204_6", False),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("\\sin^2 x + \\cos^2 x", "1", True),
        ("x + 10^{-9}", "x + 2 \\cdot 10^{-9}", False),
        (
            "\\begin{pmatrix} 10^{-9} \\\\ 1 \\end{pmatrix}",
            "\\begin{pmatrix} 2 \\cdot 10^{-9} \\\\ 1 \\end{pmatrix}",
            False,
        ),
        ("10^{30} + \\sqrt{2}", "10^{30} + \\sqrt{3}", False),
        ("\\infty", "-\\infty", False),
        ("x < 5", "5 > x", True),
        ("x < 5", "x > 5", False),
    ],
)
def test_formulas(gold: str, claim: str, is_same: bool) -> None:
    assert same_formula(gold, claim) is is_same


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 9), st.integers(-12, 3))
@settings(deadline=None, max_examples=25)
def test_surds_are_the_same_only_if_their_squares_are(a: int, b: int, scale: int, exponent: int) -> None:
    gold = f"{scale}\\sqrt{{{a}}} \\cdot 10^{{{exponent}}}"
    claim = f"\\sqrt{{{b * scale * scale}}} \\cdot 10^{{{exponent}}}"
    assert same_answer(gold, claim, same_formula) is (a == b)


def test_a_number_too_long_to_write_is_compared_with_a_formula() -> None:
    assert not same_answer("5000!", "\\sqrt{2}", same_formula)
    assert not same_answer("\\sqrt{2}", "1/5000!", same_formula)
    assert same_answer("5000!", "5000 \\cdot 4999!", same_formula)


@pytest.mark.parametrize("unit", ["m", "g", "s", "h", "t", "x"])
def test_a_letter_behind_a_number_is_a_variable(unit: str) -> None:
    for text in (f"5{unit}", f"5 {unit}"):
        assert not same_answer(text, "5", same_formula)
        assert not same_answer("5", text, same_formula)
        assert same_answer(text, f"5{unit}", same_formula)
    assert same_answer("5", f"5\\text{{ {unit}}}", same_formula)


def test_a_decimal_makes_a_small_formula_no_less_exact() -> None:
    assert same_formula("1.5 \\cdot 10^{-9} \\sqrt{2}", "3.0 \\cdot 10^{-9} \\sqrt{2} / 2")
    assert not same_formula("1.5 \\cdot 10^{-9} \\sqrt{2}", "1.6 \\cdot 10^{-9} \\sqrt{2}")


def test_a_rounded_value_is_confirmed_by_its_size_however_small_it_is() -> None:
    gold = sympy.sqrt(2) / 1000
    assert is_confirmed(gold, sympy.Float("0.00141421356"))
    assert not is_confirmed(gold, sympy.Float("0.0014143"))
