"""Columns of well-known data sets, as their makers publish them: ``data.format``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.formats import FORMATS, Columns, columns_of
from megatron_dypo.data.rows import PromptRow

CHAT = [{"content": "What is 1 + 1?", "role": "user"}]
VERL = {
    "data_source": "math_dapo",
    "prompt": CHAT,
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
LUFFY = {
    **VERL,
    "data_source": "",
    "target": [{"content": "<think>\nEasy.\n</think>\nIt is \\boxed{2}.", "role": "assistant"}],
    "extra_info": {"index": 0, "split": "default"},
}
SLIME = {
    "prompt": [{"content": "What is 1 + 1?", "role": "user", "step_loss_mask": 1}],
    "label": "2",
    "metadata": {"source_name": "sums", "rm_type": "math"},
}
OPENR1 = {
    "problem": "What is 1 + 1?",
    "solution": "It is $2$.",
    "answer": "2",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "586fd646-76d6-5070-8c81-9993ab9d8559",
    "is_reasoning_complete": [True, True, False, True],
    "generations": ["<think>\nOne.</think>2", "<think>\nTwo.</think>3", "<think>\nThree", ""],
    "correctness_math_verify": [True, False, True, None],
    "correctness_llama": None,
    "finish_reasons": None,
    "correctness_count": 2,
    "messages": [*CHAT, {"content": "<think>\nOne.</think>2", "role": "assistant"}],
}
DEEPMATH = {
    "question": "What is 1 + 1?",
    "final_answer": "2",
    "difficulty": 1.5,
    "topic": "Mathematics -> Algebra -> Sums",
    "r1_solution_1": "First.",
    "r1_solution_2": "Second.",
    "r1_solution_3": None,
}


def _both(tmp_path: Path, record: dict, **data: Any) -> PromptRow:
    """Return the row of a record, which JSONL and Parquet must read alike."""
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
    rows = []
    for name in ("x.jsonl", "x.parquet"):
        (row,) = PromptDataset([tmp_path / name], data=DataConfig(**data))
        assert row.prompt_id == f"{name}:1"
        rows.append(row)
    assert [vars(row) | {"prompt_id": ""} for row in rows[:1]] == [vars(row) | {"prompt_id": ""} for row in rows[1:]]
    return rows[0]


def test_verl_rows_of_dapo_are_read(tmp_path: Path) -> None:
    row = _both(tmp_path, VERL, format="verl")
    assert (row.prompt, row.answer, row.source, row.traces) == (CHAT, "2", "math_dapo", {})


def test_verl_rows_of_luffy_come_with_their_target(tmp_path: Path) -> None:
    row = _both(tmp_path, LUFFY, format="verl")
    assert row.traces == {"target": "<think>\nEasy.\n</think>\nIt is \\boxed{2}."}
    assert row.source == "x", "an empty source is none"
    assert _both(tmp_path, {**VERL, "target": None}, format="verl").traces == {}


def test_verl_rows_may_hold_their_objects_as_json_in_a_string(tmp_path: Path) -> None:
    record = {**VERL, "reward_model": json.dumps(VERL["reward_model"])}
    assert _both(tmp_path, record, format="verl").answer == "2"


def test_slime_rows_are_read(tmp_path: Path) -> None:
    row = _both(tmp_path, SLIME, format="slime")
    assert (row.prompt, row.answer, row.source, row.verifier) == (SLIME["prompt"], "2", "sums", None)
    assert _both(tmp_path, {**SLIME, "metadata": None}, format="slime").source == "x"
    assert _both(tmp_path, {**SLIME, "metadata": '{"source_name": "s"}'}, format="slime").source == "s"
    assert _both(tmp_path, {"prompt": "p", "label": "1"}, format="slime").prompt == "p"


def test_openr1_traces_are_used_where_each_check_says_true(tmp_path: Path) -> None:
    row = _both(tmp_path, OPENR1, format="openr1")
    assert (row.prompt, row.answer, row.source) == ("What is 1 + 1?", "2", "olympiads")
    assert row.traces == {"generation_0": "<think>\nOne.</think>2"}
    assert row.num_failed_checks == 3
    without = {**OPENR1, "correctness_math_verify": None, "generations": ["a", "b", "c", "d"]}
    assert list(_both(tmp_path, without, format="openr1").traces) == ["generation_0", "generation_1", "generation_3"]
    unchecked = DataFieldsConfig(trace_checks="correctness_math_verify")
    assert list(_both(tmp_path, OPENR1, format="openr1", fields=unchecked).traces) == ["generation_0", "generation_2"]


def test_checks_that_do_not_match_the_traces_are_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"generations=\[True\]: the column correctness_math_verify must have a boolean"
    ):
        _both(tmp_path, {**OPENR1, "correctness_math_verify": [True]}, format="openr1")
    with pytest.raises(ValueError, match=r"generations\[0\]=1: the column correctness_math_verify must hold booleans"):
        _both(tmp_path, {**OPENR1, "correctness_math_verify": [1, 1, 1, 1]}, format="openr1")


def test_deepmath_columns_are_teachers(tmp_path: Path) -> None:
    row = _both(tmp_path, DEEPMATH, format="deepmath")
    assert (row.prompt, row.answer) == ("What is 1 + 1?", "2")
    assert row.traces == {"r1_solution_1": "First.", "r1_solution_2": "Second."}


def test_fields_win_over_the_format(tmp_path: Path) -> None:
    fields = DataFieldsConfig(answer="extra_info.gold", traces=("ours", "theirs"), source="ability")
    record = {**VERL, "extra_info": {"gold": "3"}, "ours": {"r1": "a"}, "theirs": ["b", "c"]}
    row = _both(tmp_path, record, format="verl", fields=fields)
    assert (row.answer, row.source) == ("3", "MATH")
    assert row.traces == {"r1": "a", "their_0": "b", "their_1": "c"}
    with pytest.raises(ValueError, match="theirs: has a trace of 'r1', and so has another column"):
        _both(tmp_path, {**record, "theirs": {"r1": "d"}}, format="verl", fields=fields)


def test_the_plain_format_is_the_default_and_every_format_has_prompt_and_answer() -> None:
    assert columns_of("plain", DataFieldsConfig()) == Columns(
        prompt="prompt", answer="answer", source="source", traces=("traces",), id="id", verifier="verifier"
    )
    assert DataConfig().format == "plain"
    assert all(columns.prompt and columns.answer for columns in FORMATS.values())


def test_a_parquet_file_of_another_format_names_its_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([DEEPMATH]), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"x\.parquet: has no column prompt, reward_model.ground_truth; its columns are question"
    ):
        PromptDataset([tmp_path / "x.parquet"], data=DataConfig(format="verl"))
