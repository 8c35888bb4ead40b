"""The names of a verifier's parameters decide which fields it gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from megatron_dypo.grading.workers.calling import Caller
from megatron_dypo.grading.workers.signature import read_signature

VALUES = {
    "response": "R",
    "answer": "A",
    "prompt": "P",
    "source": "S",
    "prompt_id": "I",
    "row": {"x": 1},
    "extra_info": {"e": 2},
}


def _call(function: Callable[..., Any], **options: Any) -> Any:
    signature = read_signature(function, ignored=tuple(options))
    values = {field: VALUES[field] for field in signature.fields}  # only the fields that it asks for are sent
    return Caller(function=function, signature=signature, options=options, is_built_in=False).call(values)


class Callable1:
    def __call__(self, response: str, gold: str) -> tuple[str, str]:
        return response, gold


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda text, gold: (text, gold), ("R", "A")),
        (lambda text, /, gold, *, strict=False: (text, gold, strict), ("R", "A", False)),
        (lambda answer, response: (answer, response), ("A", "R")),
        (lambda response, gold: (response, gold), ("R", "A")),
        (lambda response: response, "R"),
        (lambda response, threshold=3: (response, threshold), ("R", 3)),
        (lambda response, *, row: (response, row), ("R", {"x": 1})),
        (lambda row, prompt, response: (row, prompt, response), ({"x": 1}, "P", "R")),
        (lambda a, b, prompt_id, source: (a, b, prompt_id, source), ("R", "A", "I", "S")),
        (lambda response, answer, /, prompt: (response, answer, prompt), ("R", "A", "P")),
        (lambda *both: both, ("R", "A")),
        (
            lambda a, b, **more: (a, b, more),
            ("R", "A", {k: VALUES[k] for k in ("prompt", "source", "prompt_id", "row")}),
        ),
        (
            lambda data_source, solution_str, ground_truth, extra_info=None: (
                data_source,
                solution_str,
                ground_truth,
                extra_info,
            ),
            ("S", "R", "A", {"e": 2}),
        ),
        (functools.partial(lambda a, b, threshold: (a, b, threshold), threshold=7), ("R", "A", 7)),
        (Callable1(), ("R", "A")),
        (max, "R"),
    ],
)
def test_each_parameter_gets_what_it_names(function: Callable[..., Any], expected: Any) -> None:
    assert _call(function) == expected


def test_options_of_the_project_are_filled_in_by_name() -> None:
    assert _call(lambda response, answer, style: (response, answer, style), style="boxed") == ("R", "A", "boxed")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda text: 0, "must take the response and the answer"),
        (lambda: 0, "must take the response and the answer"),
        (lambda answer, text: 0, "'answer' stands where the response is passed: name one `response`"),
        (lambda text, prompt: 0, "'prompt' stands where the answer is passed"),
        (lambda response, answer, threshold: 0, "'threshold' has no default and is none of answer, "),
        (lambda response, answer, *, depth: 0, "'depth' has no default"),
        (lambda responses, answer: 0, "mixes answer, responses: all plural, or none"),
        (lambda other, /, response: 0, "'other' is none of"),
    ],
)
def test_a_parameter_that_cannot_be_filled_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_signature(function)


def test_plural_names_make_a_function_batched() -> None:
    def batched(responses: list[str], answers: list[str], rows: list[dict]) -> Any:
        return list(zip(responses, answers, rows, strict=True))

    signature = read_signature(batched)
    assert signature.mode == "batch"
    caller = Caller(function=batched, signature=signature, options={}, is_built_in=False)
    assert caller.call_batch([VALUES, VALUES | {"response": "Q"}]) == [("R", "A", {"x": 1}), ("Q", "A", {"x": 1})]


def test_a_coroutine_function_is_asynchronous() -> None:
    async def judge(response: str, answer: str) -> bool:
        return True

    class Judge:
        async def __call__(self, response: str, answer: str) -> bool:
            return True

    assert read_signature(judge).mode == read_signature(Judge()).mode == "async"
