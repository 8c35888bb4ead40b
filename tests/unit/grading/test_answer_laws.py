"""Laws of reading and comparing answers, on random numbers, lists and texts. math-verify is not used."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dypo.grading.answers.cleaning import cleaned
from megatron_dypo.grading.answers.rationals import Rational, read_rational, same_number
from megatron_dypo.grading.answers.reading import Quantity, read_answer
from megatron_dypo.grading.answers.same import same_answer

SEPARATORS = [
    "",
    ",",
    "{,}",
    "{, }",
    ",\\!",
    ",\\! ",
    " ",
    "\\,",
    "\\ ",
    "~",
    "\u2009",
    "\u202f",
    "\u00a0",
    "\\!",
    "\\;",
]
DECORATIONS = [
    "{}", "${}$", "\\({}\\)", "{}.", " {} ", "({})", "{{{}}}", "\\left({}\\right)", "x = {}",
    "\\text{{The answer is }}{}", "{}\\text{{ cm}}", "{}~\\text{{apples}}", "\\mathbf{{{}}}", "\\${}", "{} dollars",
]  # fmt: skip
IN_BRACKETS = ["({})", "\\left({}\\right)"]
LISTS = ["{}", "\\{{{}\\}}", "$\\{{ {} \\}}$", "\\left\\{{{}\\right\\}}"]
TUPLES = [("(", ")"), ("[", "]"), ("[", ")"), ("(", "]"), ("\\left(", "\\right)")]

integers = st.integers(-(10**12), 10**12)
small = st.integers(-2000, 2000)


def _unequal(gold: str, claim: str) -> bool:
    return False


def _same(gold: str, claim: str) -> bool:
    return same_answer(gold, claim, _unequal)


def _value(text: str) -> Fraction | None:
    answer = read_answer(cleaned(text))
    return answer.number.value if isinstance(answer, Quantity) else None


@st.composite
def spelled_integers(draw: st.DrawFn) -> tuple[int, str]:
    value = draw(integers)
    text = f"{abs(value):,}".replace(",", draw(st.sampled_from(SEPARATORS)))
    return value, ("-" if value < 0 else "") + text


@st.composite
def spelled_rationals(draw: st.DrawFn) -> tuple[Fraction, str]:
    """Draw a number and one of its spellings."""
    kind = draw(st.sampled_from(["integer", "fraction", "decimal", "mixed", "scientific", "repeating"]))
    if kind == "integer":
        whole, text = draw(spelled_integers())
        return Fraction(whole), text
    if kind == "decimal":
        digits = draw(st.integers(0, 6))
        value = Fraction(draw(integers), 10**digits)
        return value, f"{float(value):,.{digits}f}" if abs(value) < 10**8 else str(value)
    if kind == "scientific":
        mantissa, exponent = draw(st.integers(-999, 999)), draw(st.integers(-30, 30))
        form = draw(st.sampled_from(["{}e{}", "{} \\times 10^{{{}}}", "{} \\cdot 10^{{{}}}", "{}×10^{{{}}}"]))
        return mantissa * Fraction(10) ** exponent, form.format(mantissa, exponent)
    if kind == "repeating":
        repeated = draw(st.integers(1, 8))
        return Fraction(repeated, 9), f"0.\\overline{{{repeated}}}"
    below = draw(st.integers(2, 500))
    above = draw(st.integers(1, below - 1))
    if kind == "mixed":
        whole = draw(st.integers(1, 2000))
        form = draw(st.sampled_from(["{}\\frac{{{}}}{{{}}}", "{} \\dfrac{{{}}}{{{}}}", "{} {}/{}"]))
        return whole + Fraction(above, below), form.format(whole, above, below)
    form = draw(
        st.sampled_from(["{}/{}", "\\frac{{{}}}{{{}}}", "\\tfrac{{{}}}{{{}}}", "\\cfrac {{{}}} {{{}}}", "{} / {}"])
    )
    return Fraction(above, below), form.format(above, below)


@given(spelled_rationals(), st.sampled_from(DECORATIONS))
@settings(deadline=None, max_examples=400)
def test_reading_is_the_inverse_of_writing_in_every_spelling(spelled: tuple[Fraction, str], decoration: str) -> None:
    value, text = spelled
    assume(decoration not in IN_BRACKETS or not re.search(r"\d,\d", text))  # (1,234) is an interval.
    assert _value(decoration.format(text)) == value


@given(spelled_rationals(), spelled_rationals())
@settings(deadline=None, max_examples=200)
def test_two_spellings_are_the_same_only_if_their_numbers_are(a: tuple[Fraction, str], b: tuple[Fraction, str]) -> None:
    is_same = _same(a[1], b[1])
    assert is_same is _same(b[1], a[1])
    if "." not in a[1] + b[1]:
        assert is_same is (a[0] == b[0])
    elif abs(a[0] - b[0]) > Fraction(1, 10**6):
        assert not is_same


@given(st.fractions(), st.fractions(), st.booleans(), st.booleans())
@settings(deadline=None)
def test_same_number_is_symmetric_and_reflexive(a: Fraction, b: Fraction, c: bool, d: bool) -> None:
    first, second = Rational(a, c), Rational(b, d)
    assert same_number(first, first)
    assert same_number(first, second) is same_number(second, first)


@given(
    st.lists(small, min_size=2, max_size=5),
    st.sampled_from(LISTS),
    st.sampled_from([", ", "; ", " \\text{ and } ", " or ", ",\\; "]),
)
@settings(deadline=None, max_examples=200)
def test_a_list_never_equals_one_of_its_members_nor_a_part_of_itself(members: list[int], form: str, comma: str) -> None:
    text = form.format(comma.join(map(str, members)))
    for member in members:
        assert not _same(text, str(member))
        assert not _same(str(member), text)
    if len(members) > 2:
        assert not _same(text, ", ".join(map(str, members[1:])))
    assert _same(text, text)


@given(
    st.lists(small, min_size=2, max_size=6),
    st.randoms(use_true_random=False),
    st.sampled_from(LISTS),
    st.sampled_from(LISTS),
)
@settings(deadline=None, max_examples=200)
def test_a_list_equals_each_order_of_itself_and_no_other_list(
    members: list[int], order: random.Random, a: str, b: str
) -> None:
    shuffled = order.sample(members, len(members))
    assert _same(a.format(", ".join(map(str, members))), b.format(", ".join(map(str, shuffled))))
    changed = [*members[:-1], members[-1] + 1]
    assert not _same(a.format(", ".join(map(str, members))), b.format(", ".join(map(str, changed))))


@given(
    st.lists(small, min_size=2, max_size=4),
    st.lists(small, min_size=2, max_size=4),
    st.sampled_from(TUPLES),
    st.sampled_from(TUPLES),
)
@settings(deadline=None, max_examples=200)
def test_tuples_are_the_same_in_the_same_order_and_brackets_only(
    a: list[int], b: list[int], c: tuple[str, str], d: tuple[str, str]
) -> None:
    first, second = (f"{pair[0]}{', '.join(map(str, members))}{pair[1]}" for members, pair in ((a, c), (b, d)))
    same_brackets = [mark.removeprefix("\\left").removeprefix("\\right") for mark in c + d]
    assert _same(first, second) is (a == b and same_brackets[:2] == same_brackets[2:])
    assert not _same(first, ", ".join(map(str, a)))
    assert not _same(", ".join(map(str, a)), first)


@given(st.integers(0, 999), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_comma_and_a_space_never_make_one_number(a: int, b: int) -> None:
    text = f"{a}, {b:03}"
    assert read_rational(text) is None
    assert not _same(f"{a}{b:03}", text)
    assert not _same(text, f"{a}{b:03}")


ALPHABET = [
    "1", "23", "000", ",", " ", ", ", ".", "-", "+", "/", "\\frac", "{", "}", "(", ")", "[", "]", "\\{", "\\}",
    "\\text{", "cm", "x", "=", "^", "_", "%", "\\pm", "and", " or ", "\\,", "!", "e", "\\sqrt", "$", "\\", "\n",
    "\\cup", "<", "\\infty", "é", "２", ":",
]  # fmt: skip
texts = st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join)


@given(texts, texts)
@settings(deadline=None, max_examples=500)
def test_any_two_texts_are_compared_alike_both_ways_and_without_an_error(gold: str, claim: str) -> None:
    assert _same(gold, claim) is _same(claim, gold)
    if cleaned(gold):
        assert _same(gold, gold)


@pytest.mark.slow
@given(texts, texts)
@settings(deadline=None, max_examples=4_000)
def test_many_texts_are_compared_alike_both_ways_and_without_an_error(gold: str, claim: str) -> None:
    assert _same(gold, claim) is _same(claim, gold)


@given(texts, st.sampled_from(["1", "23", "1000", "\\frac{1}{2}", "x", "1, 2", "(1,2)"]))
@settings(deadline=None, max_examples=300)
def test_a_text_with_a_digit_more_is_another_number(text: str, gold: str) -> None:
    value = _value(text)
    if value is not None and "%" not in text and "." not in text:
        assert _same(f"{value.numerator}/{value.denominator}", text)
        assert not _same(f"{value.numerator + 1}/{value.denominator}", text)
