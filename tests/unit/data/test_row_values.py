"""Values that no tokenizer, server or verifier accepts are found at opening; names of fields may have dots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.formats import Columns
from megatron_dypo.data.rows import BadRow, PromptRow, parse_row
from megatron_dypo.data.values import MAX_DEPTH, Absent, Broken, lookup, parse_json, printable, shown

GOOD: dict[str, Any] = {"prompt": "p", "answer": "a"}
PLAIN = Columns(source="source", traces=("traces",), id="id", verifier="verifier")
HALF = "\ud83d"


def _parse(record: object, columns: Columns = PLAIN, **options: Any) -> PromptRow:
    return parse_row(record, columns, default_id="x.jsonl:1", default_source="x", **options)


def _nested(depth: int) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": f"a {HALF}"},
        {"prompt": [{"role": "user", "content": HALF}]},
        {"prompt": [{"role": HALF, "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a", "name": HALF}]},
        {"prompt": [{"role": "user", "content": "a", HALF: "b"}]},
        {"answer": HALF},
        {"answer": {"tests": [{"input": HALF}]}},
        {"answer": {HALF: 1}},
        {"source": HALF},
        {"id": HALF},
        {"verifier": HALF},
        {"traces": {"r1": HALF}},
        {"traces": {HALF: "text"}},
        {"traces": [HALF]},
        {"traces": [{"role": "assistant", "content": HALF}]},
    ],
)
def test_half_a_character_is_found_wherever_it_is(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*has a lone surrogate at index") as caught:
        PromptDataset([path])
    str(caught.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("field", ["prompt", "answer", "source", "id", "verifier"])
def test_a_nul_is_found_in_every_field(field: str) -> None:
    with pytest.raises(BadRow, match=rf"{field}='a\\x00b': has a NUL character at index 1"):
        _parse({**GOOD, field: "a\0b"})


@pytest.mark.parametrize("field", ["prompt", "answer", "source", "id", "traces", "verifier"])
def test_an_integer_of_5000_digits_names_its_field(tmp_path: Path, field: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "' + f"unused{field}" + '": ' + "9" * 5000 + "}\n")
    assert len(PromptDataset([path])) == 1, "a field that nobody reads is no error"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, field: "HUGE"}).replace('"HUGE"', "9" * 5000) + "\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {field}=<integer of 5000 digits>"):
        PromptDataset([path])


@pytest.mark.parametrize(
    "number", ["12345678901234567890.5", "0." + "1" * 34, "1e-400", "1e-" + "9" * 20, "-0.30000000000000001"]
)
def test_a_number_with_more_digits_than_a_float_keeps_them_as_an_answer(tmp_path: Path, number: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "p", "answer": {number}}}\n{{"prompt": "q", "answer": 0.5}}\n')
    assert [row.answer for row in PromptDataset([path])] == [number, "0.5"]


def test_deep_nesting_is_a_bad_row_and_no_recursion_error() -> None:
    _parse({**GOOD, "answer": {"a": _nested(MAX_DEPTH - 1)}})
    for depth in (MAX_DEPTH + 1, 400):
        with pytest.raises(BadRow, match="must not be nested deeper than 32 levels"):
            _parse({**GOOD, "answer": _nested(depth)})
    with pytest.raises(Broken, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_answers_that_are_objects_are_kept_as_they_are() -> None:
    tests = {"inputs": ["1 2"], "outputs": ["3"], "limit": 2.5, "strict": True, "note": None}
    assert _parse({**GOOD, "answer": tests}).answer == tests
    assert _parse({**GOOD, "answer": [1, 2]}).answer == [1, 2]
    assert _parse({**GOOD, "answer": 7}).answer == "7"


def test_verifiers_that_take_text_refuse_rows_with_objects(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {**GOOD, "answer": {"x": 1}, "verifier": "pkg:judge"},
        {**GOOD, "answer": [2]},
        {**GOOD, "answer": [3]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = PromptDataset([path])
    assert dataset.verifiers == {"pkg:judge"}
    assert dataset.sources == {"x"}
    asked = []

    def takes_objects(verifier: str | None, source: str) -> bool:
        asked.append((verifier, source))
        return verifier == "pkg:judge"

    with pytest.raises(
        ValueError, match=r"x\.jsonl:3: answer=\[2\]: the verifier takes text only; 2 rows with an object"
    ):
        dataset.require_text_answers(takes_objects)
    dataset.require_text_answers(lambda verifier, source: True)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: answer=\{'x': 1\}: pkg:judge takes text only; 1 row with"):
        dataset.require_text_answers(lambda verifier, source: verifier is None)
    assert asked == [(None, "x")]


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ({"a": {"b": 1}}, "a.b", 1),
        ({"a.b": 2, "a": {"b": 1}}, "a.b", 2),
        ({"a": {"b.c": 3, "b": {"c": 1}}}, "a.b.c", 3),
        ({"a.b": {"c": 4}, "a": {"b": {"c": 1}}}, "a.b.c", 4),
        ({"a.b": {}, "a": {"b": {"c": 5}}}, "a.b.c", 5),
        ({"a": '{"b": 6}'}, "a.b", 6),
        ({"a": None}, "a.b", Absent.MISSING),
        ({"a": {"b": None}}, "a.b", None),
        ({"a": {}}, "a.b", Absent.MISSING),
        ({}, "a.b", Absent.MISSING),
    ],
)
def test_a_dotted_name_goes_into_objects_and_a_column_of_that_name_wins(record: dict, name: str, value: object) -> None:
    assert lookup(record, name) == value


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ([1], r"reward_model.ground_truth=\[1\]: must be an object with the field `ground_truth`"),
        ("rule", "reward_model.ground_truth='rule': is not JSON"),
        ({"style": "rule"}, "reward_model.ground_truth: is missing"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
    ],
)
def test_a_dotted_name_that_leads_nowhere_is_named(inner: object, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        _parse({"prompt": "p", "reward_model": inner}, Columns(answer="reward_model.ground_truth"))


def test_other_columns_are_kept_only_when_asked_for(tmp_path: Path) -> None:
    record = {**GOOD, "id": "u", "difficulty": 3.5, "extra": {"a": [1]}}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert PromptDataset([path])[0].row == {}
    assert PromptDataset([path], data=DataConfig(keep_row=True))[0].row == {"difficulty": 3.5, "extra": {"a": [1]}}
    with pytest.raises(BadRow, match=r"the row\.extra\[0\]='\\ud83d': has a lone surrogate"):
        _parse({**GOOD, "extra": [HALF]}, keep_row=True)


def test_chat_messages_in_a_string_are_messages() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert _parse({**GOOD, "prompt": json.dumps(chat)}).prompt == chat
    for text in ('[{"role": "user"}]', '["role", "content"]', "[1, 2]", '[{"role": "user", "content": "a"'):
        assert _parse({**GOOD, "prompt": text}).prompt == text


def test_an_empty_name_means_that_there_is_no_such_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**GOOD, "id": 1.5, "traces": 3}) + "\n")
    row = PromptDataset([path], DataFieldsConfig(id="", traces=""))[0]
    assert (row.prompt_id, row.traces) == ("x.jsonl:1", {})
    with pytest.raises(ValueError, match="answer='': names no column"):
        DataFieldsConfig(answer="")


def test_what_is_shown_fits_a_line_and_can_be_printed() -> None:
    assert len(shown("x" * 10**7)) == 80
    assert len(shown({f"k{i}": _nested(900) for i in range(99)})) <= 80
    assert printable("a\nb\t" + HALF) == r"a\nb\t\ud83d"
