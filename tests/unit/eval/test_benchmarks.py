"""Published files become evaluation sets with every row and its answer; a file of another set is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.evaluation import EvalConfig, EvalSetConfig
from megatron_dypo.eval.benchmarks.prepare import prepare_set
from megatron_dypo.eval.benchmarks.sets import BENCHMARKS, listing
from megatron_dypo.eval.prompts import EvalSet
from tests.support.public_data import public_file, public_rows
from tests.support.tool_commands import run_tool

ROOT = Path(__file__).parents[3]
SHORT: dict[str, list[dict[str, Any]]] = {
    "aime24": [
        {"id": 60, "problem": "Add 1 and 2.", "solution": "It is $\\boxed{003}$.", "url": "https://a"},
        {"id": 61, "problem": "Add 200 and 4.", "solution": "...", "answer": "204", "year": "2024"},
    ],
    "amc23_40": [
        {"id": 0, "question": "How far?", "answer": "27.0", "url": "u"},
        {"id": 1, "problem": "How many?", "answer": 36.0},
        {"id": 2, "question": "Which?", "answer": ["-1.0"]},
    ],
    "amc23_83": [{"id": 0, "problem": "What is m+n?", "answer": 142.0, "url": "u"}],
    "minerva": [
        {"problem": "Speed?", "solution": "First \\boxed{v}. So $\\boxed{3.5e8}$ m/s.", "type": "8.282", "idx": 4},
        {"question": "Mass?", "answer": "12.5"},
    ],
    "olympiadbench": [
        {"id": 1606, "question": "Find x.", "final_answer": ["2"], "context": None, "image_1": None, "unit": None},
        {"id": 1607, "question": "Find all.", "final_answer": ["$1$", "$\\frac{1}{2}$"], "is_multiple_answer": True},
        {"id": 1608, "question": "And y?", "final_answer": ["$y=3$"], "context": "Let x = 1."},
    ],
    "gpqa_diamond": [
        {
            "Question": f"Which gas is number {i}?\n",
            "Correct Answer": f"neon {i}\n",
            "Incorrect Answer 1": "iron,\nor steel",
            "Incorrect Answer 2": " wood\u2028oak",
            "Incorrect Answer 3": "salt",
            "Record ID": f"rec{i}",
            "Subdomain": "Chemistry",
        }
        for i in range(8)
    ],
    "arc_c": [
        {
            "id": "Mercury_1",
            "question": "Which is a gas?",
            "choices": {"text": ["iron", "neon"], "label": labels},
            "answerKey": labels[1],
        }
        for labels in (["A", "B"],)
    ],
}
"""Handwritten rows with the columns of published files, for sets of which tests have no file."""
ANSWERS = {
    "aime24": ["3", "204"],
    "amc23_40": ["27", "36", "-1"],
    "amc23_83": ["142"],
    "minerva": ["3.5e8", "12.5"],
    "olympiadbench": ["2", "1, \\frac{1}{2}", "y=3"],
    "arc_c": ["B"],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a file of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def made(folder: Path, name: str, rows: list[dict[str, Any]], ending: str = ".jsonl") -> list[dict[str, Any]]:
    prepare_set(name, write(folder / f"in{ending}", rows), folder / "out.jsonl", is_part=True)
    return read(folder / "out.jsonl")


def opened(path: Path) -> EvalSet:
    cfg = EvalConfig(sets={"one": EvalSetConfig(path=str(path), shuffle_options=True)})
    return EvalSet("one", cfg, DataConfig(), None, seed=1)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("aime24", "aime24.jsonl", 30),
        ("aime25", "aime25.jsonl", 30),
        ("amc23_83", "amc23_83.jsonl", 83),
        ("math500", "math500_test.jsonl", 500),
        ("gsm8k", "gsm8k_test.jsonl", 1319),
        ("gsm8k_train", "gsm8k_train.jsonl", 7473),
    ],
)
def test_every_row_of_a_published_file_comes_with_its_problem_and_answer(
    name: str, file: str, count: int, tmp_path: Path
) -> None:
    assert prepare_set(name, public_file(file), tmp_path / "out.jsonl") == count
    rows, published = read(tmp_path / "out.jsonl"), public_rows(file)
    assert [row["prompt"] for row in rows] == [(one.get("problem") or one["question"]).strip() for one in published]
    golds = [
        one["answer"].rsplit("#### ", 1)[-1].replace(",", "") if "gsm" in name else one["answer"] for one in published
    ]
    assert [row["answer"] for row in rows] == golds
    assert len({row["id"] for row in rows}) == count
    assert {(row["source"], row["verifier"]) for row in rows} == {(name, "math")}


def test_the_options_of_arc_are_those_of_its_prompts_and_can_be_shuffled(tmp_path: Path) -> None:
    prepare_set("arc_c", public_file("arc_c.parquet"), tmp_path / "out.jsonl")
    rows, published = read(tmp_path / "out.jsonl"), public_rows("arc_c.parquet")
    for row, one in zip(rows, published, strict=True):
        assert row["prompt"] == one["prompt"][1]["content"].strip()
        assert row["answer"] == one["reward_model"]["ground_truth"]
        lines = re.findall(r"^[A-E1-5]\) (.*)$", row["prompt"], flags=re.MULTILINE)
        assert row["options"] == [line.rstrip() for line in lines][-len(row["options"]) :]
    one_set = opened(tmp_path / "out.jsonl")
    one_set.check_options()
    one_set.close()


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_rows_with_the_published_columns_give_their_answers(name: str, ending: str, tmp_path: Path) -> None:
    rows = SHORT[name] if ending != ".parquet" else SHORT[name][:1]  # a Parquet column has one type
    out = made(tmp_path, name, rows, ending)
    assert [row["answer"] for row in out] == ANSWERS[name][: len(rows)]


def test_a_context_stands_before_its_question(tmp_path: Path) -> None:
    assert made(tmp_path, "olympiadbench", SHORT["olympiadbench"])[2]["prompt"] == "Let x = 1.\n\nAnd y?"


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_the_label_of_gpqa_is_that_of_the_correct_answer_at_every_place(ending: str, tmp_path: Path) -> None:
    out = made(tmp_path, "gpqa_diamond", SHORT["gpqa_diamond"], ending)
    for i, row in enumerate(out):
        assert row["id"] == f"gpqa_diamond-rec{i}"
        assert row["options"]["ABCD".index(row["answer"])] == f"neon {i}"
        assert sorted(row["options"]) == ["iron,\nor steel", f"neon {i}", "salt", "wood\u2028oak"]
        assert f"{row['answer']}) neon {i}" in row["prompt"]
    assert len({row["answer"] for row in out}) > 1
    one_set = opened(tmp_path / "out.jsonl")
    one_set.check_options()
    one_set.close()


def test_an_instruction_stands_behind_each_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", SHORT["arc_c"])
    prepare_set("arc_c", path, tmp_path / "out.jsonl", instruction="Box the letter.", is_part=True)
    assert read(tmp_path / "out.jsonl")[0]["prompt"] == "Which is a gas?\n\nA) iron\nB) neon\n\nBox the letter."
    one_set = opened(tmp_path / "out.jsonl")
    one_set.check_options()
    one_set.close()


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math500", {"problem": "x?", "solution": "1"}, "answer: is missing (the row has problem, solution)"),
        ("math500", {"problem": "x?", "answer": " "}, "answer=' ': must be text that is not empty"),
        ("math500", {"problem": None, "answer": "1"}, "problem or question: is missing"),
        ("aime24", {"problem": "x?", "answer": "1204"}, "answer=1204: an answer of AIME is from 0 to 999"),
        ("aime24", {"problem": "x?", "answer": "p - q"}, "answer='p - q': must be an integer"),
        ("amc23_40", {"question": "x?", "answer": 2.5}, "answer=2.5: must be an integer"),
        ("amc23_40", {"question": "x?", "answer": True}, "answer=True: must be an integer"),
        ("minerva", {"problem": "x?", "solution": "It is 4."}, "must have the answer in a \\boxed{}"),
        ("olympiadbench", {"question": "x?", "final_answer": []}, "final_answer=[]: must be texts"),
        (
            "olympiadbench",
            {"question": "x?", "final_answer": ["1"], "image_1": "p.png"},
            "image_1='p.png': has a picture",
        ),
        ("gsm8k", {"question": "x?", "answer": "It is 4."}, "must end with #### and a number"),
        ("arc_c", {**SHORT["arc_c"][0], "answerKey": "E"}, "answerKey='E': must be one of the labels A, B"),
        ("arc_c", {**SHORT["arc_c"][0], "choices": {"text": ["a"], "label": ["A", "B"]}}, "of one length"),
        ("gpqa_diamond", {"Question": "x?", "Correct Answer": "1"}, "Incorrect Answer 1: is missing"),
        ("math500", ["x"], "must be an object"),
        ("math500", {"problem": "x?\0", "answer": "1"}, "NUL"),
    ],
)
def test_a_row_that_breaks_a_rule_is_named_with_line_field_and_rule(
    name: str, row: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [row])
    with pytest.raises(ValueError, match="1 row of") as error:
        prepare_set(name, path, tmp_path / "out.jsonl", is_part=True)
    assert f"{path}:1: " in str(error.value)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b"{not json\n", "a.jsonl:1: is not JSON"),
        ("a.parquet", b"PAR1 garbage", "is not a Parquet file"),
        ("a.json", b'{"a": 1}', "must be a list of objects"),
        ("a.json", b"[", "is not JSON"),
        ("a.csv", b"Question,Correct Answer\n1\n", "another number of fields than the header, 2"),
        ("a.csv", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("a.txt", b"", "must end in .jsonl, .parquet, .json, .csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        prepare_set("gpqa_diamond", tmp_path / file, tmp_path / "out.jsonl", is_part=True)
    assert str(tmp_path / file) in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_another_size_or_with_an_id_twice_is_refused_and_an_older_output_stays(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    path = write(tmp_path / "in.jsonl", SHORT["amc23_40"])
    with pytest.raises(ValueError, match=r"has 3 rows, and amc23_40 \(.*\) has 40: a file of another set"):
        prepare_set("amc23_40", path, tmp_path / "out.jsonl")
    write(path, SHORT["amc23_40"][:1] * 2)
    with pytest.raises(ValueError, match=r"in\.jsonl:2: id='amc23_40-0': is that of .*in\.jsonl:1 too"):
        prepare_set("amc23_40", path, tmp_path / "out.jsonl", is_part=True)
    with pytest.raises(ValueError, match="two sets are called AMC: amc23_83 and amc23_40"):
        prepare_set("amc", path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="is the published file itself"):
        prepare_set("amc23_40", path, path, is_part=True)
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_the_list_and_the_page_name_every_set_with_its_licence_and_size() -> None:
    page, shown = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"), listing()
    for name, one in BENCHMARKS.items():
        assert f"{name}: {one.title}" in shown
        assert f"| `{name}` |" in page
        assert all(f" {count}" in page.split(f"| `{name}` |", 1)[1].split("\n", 1)[0] for count in one.rows)


def test_the_program_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", SHORT["amc23_83"])
    done = run_tool("prepare_data.py", "make", "amc23_83", path, tmp_path / "out.jsonl", "--part")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out.jsonl'}: 1 rows of amc23_83\n")
    done = run_tool("prepare_data.py", "make", "amc", path, tmp_path / "out.jsonl")
    assert done.returncode == 65
    assert done.stderr.startswith("prepare_data: error: set='amc': two sets are called AMC")
