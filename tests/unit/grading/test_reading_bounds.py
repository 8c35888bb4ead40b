"""Reading answers that are barely, or barely not, of a kind."""

from __future__ import annotations

import pytest

from megatron_dypo.grading.answers.cleaning import cleaned
from megatron_dypo.grading.answers.reading import Quantity, read_answer
from megatron_dypo.grading.answers.splitting import split_list
from megatron_dypo.grading.answers.unmarked import last_value


@pytest.mark.parametrize(
    ("text", "name"),
    [("x = 5 + 6 = 11", "x"), ("5 + 6 = 10 + 1 = 11", None), ("x = y = 2 + 9 = 11", "x"), ("x = 11", "x")],
)
def test_a_chain_of_equations_is_its_last_value_under_the_first_name(text: str, name: str | None) -> None:
    answer = read_answer(cleaned(text))
    assert isinstance(answer, Quantity)
    assert (answer.name, answer.text) == (name, "11")


def test_one_equation_without_a_name_is_no_number() -> None:
    assert not isinstance(read_answer(cleaned("5 + 6 = 11")), Quantity)


@pytest.mark.parametrize(("text", "brackets"), [("()", "()"), ("[ ]", "[]"), ("\\{\\}", "{}")])
def test_empty_brackets_have_no_member(text: str, brackets: str) -> None:
    assert split_list(cleaned(text)) == (brackets, ())


@pytest.mark.parametrize(
    ("text", "value"),
    [("It is -5", "-5"), ("It is x -5", None), ("It is 7 −5", None), ("so it is x 5", "5"), ("It is (a) 5", "5")],
)
def test_a_minus_after_a_term_is_a_difference_and_no_sign(text: str, value: str | None) -> None:
    assert last_value(text) == value


def test_a_number_is_read_up_to_400_characters() -> None:
    assert isinstance(read_answer("1" * 400), Quantity)
    assert not isinstance(read_answer("x = " + "1" * 397), Quantity)
