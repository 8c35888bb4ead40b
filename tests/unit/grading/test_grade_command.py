"""``megatron-dypo grade``: counts, disagreements, bad rows, exit statuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from megatron_dypo.cli import app

HERE = "tests.support.grading.verifiers"
ROWS = [
    {"response": "a", "answer": "a", "label": True},
    {"response": "b", "answer": "a", "label": 0},
    {"response": "raise", "answer": "a", "label": True},
    {"response": "b", "answer": "b", "label": False},
    {"response": "raise", "answer": "b", "label": None},
    {"response": "\ud83d", "answer": "b", "label": True},
    {"response": "c", "answer": "c", "label": None},
]


def _file(path: Path, rows: Sequence[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def _grade(file: Path, *options: str, function: str = f"{HERE}:obedient") -> Result:
    return CliRunner().invoke(app, ["grade", str(file), "--verifier", function, "--workers", "1", *options])


def test_verdicts_and_disagreements_are_counted(tmp_path: Path) -> None:
    run = _grade(_file(tmp_path / "pairs.jsonl", ROWS), "--expected", "label", "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    counts = {key: found[key] for key in ("rows", "correct", "wrong", "no_verdict", "compared", "mean_reward")}
    assert counts == {"rows": 7, "correct": 3, "wrong": 2, "no_verdict": 2, "compared": 4, "mean_reward": 0.6}
    assert (found["accepted_wrong"], found["refused_correct"]) == (1, 1)
    assert [row["line"] for row in found["disagreements"]] == [4, 6]
    (reason,) = found["reasons"]
    assert (reason["count"], reason["first_line"]) == (2, 3)
    assert reason["error"].startswith("KeyError: 'no such unit'")


def test_people_get_a_table_and_as_many_examples_as_they_ask_for(tmp_path: Path) -> None:
    run = _grade(_file(tmp_path / "pairs.jsonl", ROWS), "--expected", "label", "--show", "1")
    lines = run.stdout.splitlines()
    assert lines[0].endswith(f"pairs.jsonl, verifier {HERE}:obedient: 7 responses")
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["correct", "3", "42.9%"],
        ["wrong", "2", "28.6%"],
        ["no", "verdict", "2"],
    ]
    assert "2 × KeyError: 'no such unit' (verifiers.py:" in run.stdout
    assert "differs from 'label' in 2 of 4 verdicts: 1 accepted that are marked wrong, 1 refused" in run.stdout
    assert lines[-2:] == ["  line 4: accepts; answer 'b'; response ends 'b'", "  and 1 more row (--show)"]


def test_the_column_expected_is_read_where_a_row_has_it(tmp_path: Path) -> None:
    rows = [{"response": "a", "answer": "a", "expected": 0}, {"response": "a", "answer": "a"}]
    found = json.loads(_grade(_file(tmp_path / "pairs.jsonl", rows), "--json").stdout)
    assert (found["compared"], found["accepted_wrong"]) == (1, 1)


def test_parquet_rows_bring_objects_and_other_columns_to_the_verifier(tmp_path: Path) -> None:
    row = {"prompt": "p", "source": "s", "id": "7", "level": 3}
    answer = {"response": "r", "prompt": "p", "source": "s", "id": "7", "row": row}
    file = _file(tmp_path / "pairs.parquet", [{"text": "r", "gold": answer, **row}])
    run = _grade(file, "--field-response", "text", "--field-answer", "gold", "--json", function=f"{HERE}:whole_row")
    assert json.loads(run.stdout)["correct"] == 1, run.stdout


def test_a_dotted_name_is_the_part_of_an_object(tmp_path: Path) -> None:
    row = {"response": "a", "reward_model": {"ground_truth": "a"}, "a.b": "c"}
    file = _file(tmp_path / "pairs.jsonl", [row])
    for field, is_right in (("reward_model.ground_truth", True), ("a.b", False)):
        found = json.loads(_grade(file, "--field-answer", field, "--json").stdout)
        assert (found["correct"], found["wrong"]) == (int(is_right), int(not is_right))
    run = _grade(file, "--field-answer", "reward_model.truth")
    assert "pairs.jsonl:1: reward_model.truth: is missing (the row has response, reward_model, a.b)" in run.stderr


def test_what_a_verifier_prints_is_no_part_of_the_output(tmp_path: Path) -> None:
    file = _file(tmp_path / "pairs.jsonl", [{"response": "print", "answer": "print"}])
    run = _grade(file, "--json", "--deadline-s", "60", function=f"{HERE}:strange")
    assert json.loads(run.stdout)["correct"] == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "a"}, "response: is missing (the row has answer)"),
        ({"response": 3, "answer": "a"}, "response=3: must be a string"),
        ({"response": "a", "answer": None}, "answer=None: must not be null"),
        ({"response": "a", "answer": "a", "expected": "yes"}, "expected='yes': must be true, false, 0, 1 or null"),
        ({"response": "a", "answer": "a", "expected": 0.5}, "expected=0.5: must be"),
        (["a", "a"], "['a', 'a']: must be an object"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, row: Any, problem: str) -> None:
    file = _file(tmp_path / "pairs.jsonl", [ROWS[0], row])
    run = _grade(file)
    assert run.exit_code == 65
    assert f"{file}:2: {problem}" in run.stderr
    assert run.stdout == ""


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    run = _grade(_file(tmp_path / "pairs.jsonl", [{"response": "a"}] * 30))
    assert "30 bad rows:" in run.stderr
    assert len(run.stderr.splitlines()) == 22
    assert run.stderr.splitlines()[-1] == "  and 10 more"


@pytest.mark.parametrize(
    ("name", "content", "function", "message"),
    [
        ("pairs.jsonl", b"", "exact", "has no rows"),
        ("pairs.jsonl", b'{"response": "a"', "exact", "pairs.jsonl:1: is not JSON"),
        (
            "pairs.jsonl",
            b'{"response": "a", "answer": "\xff"}',
            "exact",
            "pairs.jsonl:1: byte 29 of the line is not UTF-8",
        ),
        ("pairs.parquet", b"PAR1 no, not at all PAR1", "exact", "pairs.parquet: is not a Parquet file"),
        ("pairs.csv", b"a,b", "exact", "must end in .jsonl or .parquet"),
        ("pairs.jsonl", b'{"response": "a", "answer": "a"}', "exakt", "verifier='exakt': must be one of math, exact"),
        (
            "pairs.jsonl",
            b'{"response": "a", "answer": "a"}',
            "no.such:f",
            "grading.verifier='no.such:f': cannot import",
        ),
    ],
)
def test_bad_input_has_an_exit_status_of_its_own(
    tmp_path: Path, name: str, content: bytes, function: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    run = _grade(tmp_path / name, function=function)
    assert run.exit_code == 65
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    run = _grade(tmp_path / "pairs.parquet")
    assert (run.exit_code, run.stdout) == (65, "")
    assert "pairs.parquet: no such file" in run.stderr
    assert _grade(_file(tmp_path / "pairs.jsonl", ROWS), "--expected", "typo").exit_code == 65


def test_a_file_without_any_verdict_ends_as_a_round_without_any_does(tmp_path: Path) -> None:
    rows = [{"response": "5", "answer": "5"}, {"response": "6", "answer": "7"}]
    run = _grade(_file(tmp_path / "pairs.jsonl", rows), "--json", function=f"{HERE}:never_judges")
    assert run.exit_code == 12, run.stderr
    assert json.loads(run.stdout)["no_verdict"] == 2
