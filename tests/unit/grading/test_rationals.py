"""Plain numbers are read exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.grading.answers.rationals import read_rational, same_number


def _same(a: str, b: str) -> bool:
    first, second = read_rational(a), read_rational(b)
    assert first is not None
    assert second is not None
    return same_number(first, second)


@given(st.fractions())
def test_every_fraction_is_read_exactly_in_each_notation(value: Fraction) -> None:
    n, d = value.numerator, value.denominator
    sign = "-" if n < 0 else ""
    for text in (f"{n}/{d}", f"{sign}\\frac{{{abs(n)}}}{{{d}}}", f"\\dfrac{{{n}}}{{{d}}}", f"$ {n} / {d} $."):
        number = read_rational(text)
        assert number is not None
        assert number.value == value


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_equal_only_if_they_are(a: int, b: int) -> None:
    assert _same(f"{a:,}", str(b)) == (a == b)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2^99", Fraction(1, 2**99)),
        ("\\frac{1}{2^{98}}", Fraction(1, 2**98)),
        ("1.602e-19", Fraction(1602, 10**22)),
        ("1.602 \\times 10^{-19}", Fraction(1602, 10**22)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1{,}000", Fraction(1000)),
        (" \\$ 18", Fraction(18)),
        ("-2^2", Fraction(-4)),
        ("−7", Fraction(-7)),
        (".5", Fraction(1, 2)),
        ("32,349", Fraction(32349)),
        ("32,\\!349", Fraction(32349)),
        ("32\\,349", Fraction(32349)),
        ("1 000", Fraction(1000)),
        ("2\u2009000\u2009000.5", Fraction(4000001, 2)),
        ("1/6!", Fraction(1, 720)),
        ("(1/2)^{3}", Fraction(1, 8)),
        ("\\cfrac{1}{(-2)}", Fraction(-1, 2)),
    ],
)
def test_notations(text: str, value: Fraction) -> None:
    number = read_rational(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "1,2",
            "3 4",
            "2\\frac{1}{2}",
            "50\\%",
            "5\\text{ cm}",
            "1/0",
            "9^{9^{9^9}}",
            "9^{999999}",
            "1e9999999",
        ),
        *(
            "0, 180",
            "0,180",
            "32, 349",
            "1,234,56",
            "1234,567",
            "1,234 567",
            "1\\,234,567",
            "1{,}5",
            "1\n000",
            "1,\\,000",
        ),
        *("(" * 200 + "1" + ")" * 200, "{" * 200 + "1" + "}" * 200, "10001!", "3!!", "(-1)!", "(1/2)!"),
        *("\\sqrt{2}", "(1,2)", "1+1", "0^{-1}", "\\frac12", "1/", "^2", "1" * 5000),
    ],
)
def test_everything_else_is_left_to_others(text: str) -> None:
    assert read_rational(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1/2^99", "1/2^98", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("1.602e-19", "1.7e-19", False),
        ("12345678", "12345678.4", False),
        ("0.5", "1/2", True),
        ("10000000000000001", "10000000000000002", False),
        ("0", "0.0000001", False),
        ("1/2004!", "1/2006!", False),
        ("1 000", "2 000", False),
        ("1,000", "1 000", True),
    ],
)
def test_rounding_is_forgiven_in_decimals_only(a: str, b: str, same: bool) -> None:
    assert _same(a, b) is same
    assert _same(b, a) is same
