"""Finding where a response states its answer: marks, formats, thinking; also in long and broken texts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.grading import AnswerFormat, GradingConfig, Thinking
from megatron_dypo.grading.answers.extract import (
    after_thinking,
    boxed_answer,
    boxes,
    gold_text,
    last_boxed,
    last_phrase,
    marked_answer,
    without_end_tokens,
)
from megatron_dypo.grading.answers.style import AnswerStyle
from megatron_dypo.grading.choice import chosen_letter, verify_choice
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.grading.math import verify_math

LENGTH = 60_000
GROWTH = 10
"""Largest growth of processor time for a text that is four times as long. A linear pass takes four times as long, a
quadratic one 16 times."""
PIECES = [
    "\\boxed{",
    "{",
    "}",
    "\\boxed{1}, ",
    "answer is ",
    "answer is (",
    "答案",
    "$",
    "\\(",
    "####",
    "<answer>",
    "<think>",
    " ",
    "\n",
    "A ",
    "A, ",
    "1,000,",
    "x=",
    "*",
    "<<",
    "</s>",
    "\\text{",
    "\\",
    "1 and ",
    "final answer\n",
]


def _naive_last_box(text: str) -> str | None:
    """Find the last box by its definition: the last one from which the braces close."""
    for start in reversed(range(len(text))):
        if text.startswith("\\boxed{", start):
            depth = 0
            for end in range(start, len(text)):
                depth += (text[end] == "{") - (text[end] == "}")
                if depth == 0 and text[end] == "}":
                    return text[start + len("\\boxed{") : end].strip()
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", " ", "\\frac"]), max_size=20).map("".join))
@settings(deadline=None, max_examples=300)
def test_the_last_box_is_that_of_the_definition(text: str) -> None:
    assert last_boxed(text) == _naive_last_box(text)
    assert [text[box.start : box.end].startswith("\\boxed") for box in boxes(text)] == [True] * len(boxes(text))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1} \\boxed{2", "1"),
    ],
)
def test_escaped_braces_are_characters(text: str, content: str) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1}\\boxed{2}", "1, 2"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("\\boxed{1}, \\boxed{2}, \\text{ or } \\boxed{3}", "1, 2, 3"),
        ("\\[\\boxed{-2} \\quad \\text{and} \\quad \\boxed{1}\\]", "-2, 1"),
        ("\\boxed{5}\n\n\\boxed{5}", "5"),
        ("\\boxed{4}\n\n\\boxed{5}", "5"),
        ("\\boxed{4}, no: \\boxed{5}", "5"),
    ],
)
def test_boxes_that_a_conjunction_joins_are_a_list(text: str, content: str) -> None:
    assert boxed_answer(text) == content


def _read_all(whole: str, formats: tuple[str, ...]) -> None:
    for answer_format in formats:
        marked_answer(whole, AnswerStyle(answer_format=answer_format))  # type: ignore[arg-type]
    last_phrase(whole)
    without_end_tokens(whole)
    chosen_letter(whole)
    verify_exact(whole, "5")


@pytest.mark.parametrize("piece", PIECES)
def test_reading_takes_time_linear_in_the_length(piece: str) -> None:
    def seconds(length: int) -> float:
        whole, least = piece * (length // len(piece)), math.inf
        for _ in range(3):
            start = time.process_time()
            _read_all(whole, ("auto", "r1_zero"))
            least = min(least, time.process_time() - start)
        return least

    assert seconds(LENGTH) < GROWTH * seconds(LENGTH // 4)


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_a_megabyte_is_read(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))  # in quadratic time it would take hours
    for whole in (text, f"\\boxed{{{text}}}", f"answer is {text}"):
        _read_all(whole, get_args(AnswerFormat))
        verify_choice(whole, "3")


def test_a_hundred_thousand_boxes_and_brackets_are_read() -> None:
    """Each is read once: in quadratic time it would take hours."""
    assert last_boxed("\\boxed{" * 100_000) is None
    assert last_boxed("\\boxed{" * 100_000 + "5}") == "5"
    assert last_boxed("\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}") == "{" * 100_000 + "}" * 100_000
    assert not verify_math("\\boxed{" * 100_000, "5")
    assert not verify_math("\\boxed{" + "(" * 100_000 + "}", "5")


PARTS = ["<think>", "</think>", "<THINKING>", "</thinking>", "a", "\\boxed{4}", " "]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
@settings(deadline=None)
def test_what_counts_is_a_tail_of_the_response_without_a_thinking_tag(text: str) -> None:
    tail = after_thinking(text, "after")
    if tail is not None:
        assert text.endswith(tail)
        assert "think" not in tail.lower()
        assert after_thinking(text, "required") == (tail if "</" in text else None)
    assert after_thinking(text, "anywhere") == text


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
@settings(deadline=None)
def test_thinking_that_never_ends_states_no_answer(text: str) -> None:
    response = text + "<think>So \\boxed{4}."
    for verify in (verify_math, verify_exact):
        assert not verify(response, "4")
    assert not verify_choice("<think>So \\boxed{B}.", "B")


@pytest.mark.parametrize("thinking", get_args(Thinking))
def test_the_text_after_the_thinking_outweighs_a_box_inside(thinking: Thinking) -> None:
    style = AnswerStyle(thinking=thinking)
    for inside, outside in (("4", "5"), ("5", "4")):
        response = f"<think>\\boxed{{{inside}}}</think> So \\boxed{{{outside}}}."
        assert verify_math(response, outside, style)
        assert not verify_math(response, inside, style)


@pytest.mark.parametrize(
    ("verify", "right", "wrong"),
    [(verify_math, "34", "33"), (verify_exact, "Paris", "Rome"), (verify_choice, "C", "D")],
)
def test_all_verifiers_read_all_formats(verify: Callable[..., bool], right: str, wrong: str) -> None:
    forms = {
        "boxed": "So \\boxed{%s}.",
        "answer_tag": "So <answer> %s </answer>",
        "r1_zero": "<think>hm</think> <answer>%s</answer><|im_end|>",
        "final_answer": "So.\n**Final Answer:** %s",
        "gsm8k": "So.\n#### %s",
    }
    assert {*forms, "auto"} == set(get_args(AnswerFormat))
    for name, form in forms.items():
        style = AnswerStyle(answer_format=name)  # type: ignore[arg-type]
        for said in (right, wrong):
            assert verify(form % said, right, style) is (said == right)
            assert verify(form % said, right) is (said == right)
        for other, other_form in forms.items():
            if {name, other} != {"answer_tag", "r1_zero"} and (name, other) != ("boxed", "boxed"):
                assert verify(other_form % right, right, style) is (name == other)


@pytest.mark.parametrize(("field", "value"), [("answer_format", "box"), ("thinking", "before")])
def test_an_unknown_style_is_refused_with_its_value(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}='{value}': must be one of "):
        AnswerStyle(**{field: value})  # type: ignore[arg-type]


def test_the_configuration_has_the_defaults_of_the_style() -> None:
    style, cfg = AnswerStyle(), GradingConfig()
    assert (style.answer_format, style.thinking) == (cfg.answer_format, cfg.thinking) == ("auto", "after")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("So <answer> 5 </answer>", "5"),
        ("48/2 = <<48/2=24>>24\n#### 1,234", "1,234"),
        ("#### a heading\n5", "#### a heading\n5"),
        (" 5 ", "5"),
    ],
)
def test_a_gold_states_its_answer_in_these_ways(answer: str, text: str) -> None:
    assert gold_text(answer) == text


@pytest.mark.parametrize("verify", [verify_math, verify_exact, verify_choice])
@pytest.mark.parametrize("answer", ["", "  \n", "\\boxed{}", "<answer> </answer>"])
def test_a_blank_gold_is_refused(verify: Callable[..., bool], answer: str) -> None:
    with pytest.raises(ValueError, match=r"^answer=.*: must not be blank"):
        verify("5", answer)


@pytest.mark.parametrize("answer", ["K", "AB", "0", "12", "é"])
def test_a_gold_that_no_response_can_choose_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="must be one letter from A to J, or one digit from 1 to 9"):
        verify_choice("B", answer)


def test_gsm8k_fields_are_judged_each_way() -> None:
    field = "He sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72 clips.\n#### 1,{:03}"
    for number in range(100):
        assert verify_math(f"1{number:03}", field.format(number))
        assert not verify_math("72", field.format(number))
        assert verify_math(field.format(number), f"1,{number:03}")
