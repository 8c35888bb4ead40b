"""Bad rows: each is named by file, line, field, value and rule."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dypo.data.dataset import PromptDataset

GOOD = {"prompt": "p", "answer": "a"}


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
        ({"answer": None}, "answer=None: must be a string or a finite number"),
        ({"answer": True}, "answer=True: must be a string or a finite number"),
        ({"answer": ["1"]}, "answer=['1']: must be a string or a finite number"),
        ({"answer": float("nan")}, "answer=nan: must be a string or a finite number"),
        ({"answer": "  "}, "answer='  ': must not be empty"),
        ({"source": 1}, "source=1: must be a string"),
        ({"id": 1.5}, "id=1.5: must be a string or an integer"),
        ({"traces": ["x"]}, "traces=['x']: must be an object: teacher name → trace text"),
        ({"traces": {"r1": 3}}, "traces.r1=3: must be a string"),
        ({"traces": {"r1": ""}}, "traces.r1='': must not be empty"),
    ],
)
def test_each_rule_names_file_line_field_and_value(tmp_path: Path, change: dict, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, **change})}\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        PromptDataset([path])
    assert str(caught.value) == f"1 bad rows in the prompt files:\n  {path}:3: {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "p"', "is not JSON: Expecting ',' delimiter at column 15"),
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
    with pytest.raises(ValueError, match=r"id='a\.jsonl:1': is the id of"):
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
    with pytest.raises(ValueError, match=r"x\.jsonl:1: is not JSON.*has changed"):
        dataset[0]
