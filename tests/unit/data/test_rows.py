"""Bad rows: each is named by file, line, field, value and rule."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dypo.data.dataset import PromptDataset

GOOD = {"prompt": "p", "answer": "a"}
ANSWER = "must be a string, a finite number, or an object or list that is not empty"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": ""}, "prompt='': must not be empty"),
        ({"prompt": 3}, "prompt=3: must be a string or a list of chat messages"),
        ({"prompt": None}, "prompt=None: must be a string or a list of chat messages"),
        ({"prompt": []}, "prompt=[]: must be a string or a list of chat messages"),
        ({"prompt": ["hi"]}, "prompt[0]='hi': must be an object with `role` and `content`"),
        ({"prompt": [{"role": "user"}]}, "prompt[0].content=None: must be a string"),
        ({"prompt": [{"role": "user", "content": "a"}, {"content": "b"}]}, "prompt[1].role=None: must be a string"),
        (
            {"prompt": [{"role": "user", "content": " "}]},
            "prompt=[{'content': ' ', 'role': 'user'}]: has no message with content",
        ),
        ({"answer": None}, f"answer=None: {ANSWER}"),
        ({"answer": True}, f"answer=True: {ANSWER}"),
        ({"answer": {}}, f"answer={{}}: {ANSWER}"),
        ({"answer": []}, f"answer=[]: {ANSWER}"),
        ({"answer": float("nan")}, f"answer=nan: {ANSWER}"),
        ({"answer": {"tests": [1, float("inf")]}}, "answer.tests[1]=inf: must be finite"),
        ({"answer": {"tests": ["a\0"]}}, "answer.tests[0]='a\\x00': has a NUL character at index 1"),
        ({"answer": "  "}, "answer='  ': must not be empty"),
        ({"source": 1}, "source=1: must be a string"),
        ({"id": 1.5}, "id=1.5: must be a string or an integer"),
        ({"traces": 3}, "traces=3: must be a text, a chat message, a list of them, or an object: teacher name → trace"),
        ({"traces": {"": "x"}}, "traces='': a teacher's name must be a string that is not empty"),
        ({"traces": [" "]}, "traces[0]=' ': must not be empty"),
        (
            {"traces": '{"r1": "x"}'},
            'traces=\'{"r1": "x"}\': is an object or a list in a string: write the object itself',
        ),
        (
            {"traces": [[{"role": "user", "content": "x"}]]},
            "traces[0]=[{'content': 'x', 'role': 'user'}]: a chat must end with its only message of the assistant",
        ),
        ({"verifier": 3}, "verifier=3: must be a string"),
        ({"traces": {"r1": 3}}, "traces.r1=3: must be a string"),
        ({"traces": {"r1": ""}}, "traces.r1='': must not be empty"),
    ],
)
def test_each_rule_names_file_line_field_and_value(tmp_path: Path, change: dict, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, **change})}\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        PromptDataset([path])
    assert str(caught.value) == f"1 bad row in the prompt files:\n  {path}:3: {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "p"', "is not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "p", "prompt": "q", "answer": "1"}', "has the key 'prompt' twice"),
        (
            b'{"prompt": "p", "answer": ' + b"1" * 5000 + b"}",
            "answer=<integer of 5000 digits>: is too long for a number: write it as a string",
        ),
        (b"[1]", "[1]: must be an object"),
        (b'{"prompt": "\xff"}', "byte 12 of the line is not UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"question": "q", "answer": "1"}', "prompt: is missing (the row has question, answer)"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        PromptDataset([path])
    assert str(caught.value).splitlines()[1] == f"  {path}:2: {problem}"


def test_the_first_twenty_bad_rows_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [GOOD if i % 2 else {"prompt": 1, "answer": None} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="30 bad rows") as caught:
        PromptDataset([path])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 20 * 2 + 1
    assert lines[-1] == "  and 10 more"
    assert lines[40].startswith(f"  {path}:39: answer=None")


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    a.write_text("".join(json.dumps({**GOOD, "id": name}) + "\n" for name in ("u", "v", "u")))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**GOOD, "id": "w"}, {**GOOD, "id": "v"}]), b)
    with pytest.raises(ValueError, match="2 bad rows") as caught:
        PromptDataset([a, b])
    assert str(caught.value).splitlines()[1:] == [
        f"  {a}:3: id='u': is the id of {a}:1 too",
        f"  {b}:2: id='v': is the id of {a}:2 too",
    ]


def test_a_file_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"a\.jsonl: is the same file as .*a\.jsonl: name each once"):
        PromptDataset([path, path])


def test_bad_parquet_rows_are_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, {"prompt": None, "answer": "a"}]), path)
    with pytest.raises(ValueError, match=r"x\.parquet:2: prompt=None: must be a string"):
        PromptDataset([path])


def test_a_row_that_changed_under_us_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    dataset = PromptDataset([path])
    path.write_text(" " * 30)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the file has changed since it was opened"):
        dataset[0]
