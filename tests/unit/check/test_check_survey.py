"""``megatron-dypo check`` looks at everything that a run reads, before the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dypo.check.report import Report, to_data, to_text
from megatron_dypo.check.survey import survey
from megatron_dypo.cli import app
from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause
from tests.golden.render_check import GOLDEN, render_check
from tests.support.check_cases import case, rows, write_case, write_rows


def checked(config: Config) -> Report:
    return survey(config, show_progress=False)


def test_the_report_is_that_of_the_golden_file(tmp_path: Path) -> None:
    assert render_check(tmp_path) == GOLDEN.read_text(encoding="utf-8"), (
        "python -m tests.golden.render_check writes it anew; read the diff"
    )
    assert not (tmp_path / "run").exists()


def test_the_share_of_a_teachers_wrong_traces_is_said_with_its_interval(tmp_path: Path) -> None:
    config = case(tmp_path)
    write_rows(tmp_path / "train.jsonl", rows(300))
    report = checked(config)
    careful, hasty = report.teachers
    assert (careful.num_right, careful.num_wrong) == (200, 0)
    assert hasty.num_right + hasty.num_wrong == 200
    assert hasty.accuracy == pytest.approx(0.85, abs=0.07)
    (warning,) = [text for text in report.warnings if text.startswith("teacher hasty: ")]
    assert f"calls {hasty.num_wrong} of 200 traces judged wrong" in warning
    _, hasty = survey(config, judge_all=True, show_progress=False).teachers
    assert (hasty.num_right, hasty.num_wrong) == (255, 45)


def test_a_verifier_that_accepts_everything_is_said(tmp_path: Path) -> None:
    report = checked(case(tmp_path, grading={"verifier": "tests.support.check_cases:approve"}))
    found, of_set = report.verifiers
    assert (of_set.rows, of_set.num_tried, of_set.num_empty) == ("eval.sets.held_out", 2, 2)
    assert (found.num_tried, found.num_gold, found.num_empty, found.num_constant, found.num_other) == (
        20,
        20,
        20,
        20,
        20,
    )
    text = "\n".join(report.warnings)
    assert "accepts an empty response on 20 of 20 rows tried" in text
    assert "accepts 'I do not know.' on each of 20 rows tried" in text
    assert report.problems == []


def test_answers_that_their_verifier_refuses_are_said_with_a_row(tmp_path: Path) -> None:
    config = case(tmp_path, grading={"verifier": "choice"})
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"{n}?", "answer": "ninety" if n % 2 else "A"} for n in range(10)])
    report = checked(config)
    found, of_set = report.verifiers
    assert (found.rows, found.num_tried, found.num_gold) == ("data.prompts", 10, 5)
    assert (of_set.rows, of_set.num_tried, of_set.num_gold) == ("eval.sets.held_out", 2, 0)
    assert any(
        "5 of 10 rows tried have an answer that it does not accept; prompt train.jsonl:2" in w for w in report.warnings
    )


def test_an_evaluation_set_is_tried_with_its_own_verifier_on_the_rows_that_are_used(tmp_path: Path) -> None:
    held_out = {"path": str(tmp_path / "held_out.jsonl"), "verifier": "choice", "max_prompts": 1}
    report = checked(case(tmp_path, eval={"sets": {"held_out": held_out}}))
    found = report.verifiers[-1]
    assert (found.rows, found.verifier, found.num_tried, found.num_gold) == ("eval.sets.held_out", "choice", 1, 0)
    (warning,) = [text for text in report.warnings if "does not accept" in text]
    assert warning.startswith("eval.sets.held_out: verifier choice, source")
    assert "1 of 1 rows tried have an answer that it does not accept; prompt new, verifier choice" in warning
    assert report.problems == []


ROW_TAKER = "tests.support.grading.verifiers:whole_row"


@pytest.mark.parametrize(
    ("keys", "row", "problem"),
    [
        ({}, {"verifier": "os:system"}, "verifier='os:system': a row may name "),
        ({}, {"answer": {"value": 3}}, "answer={'value': 3}: the verifier takes text only"),
        ({"shuffle_options": True}, {}, "prompt held_out.jsonl:1: shuffle_options: no options found"),
        ({"verifier": ROW_TAKER}, {}, f"data.keep_row=false: {ROW_TAKER} asks for the row's other columns"),
        ({"verifier": "no_such:f"}, {}, "verifier='no_such:f': cannot import no_such"),
    ],
)
def test_rows_that_the_verifiers_of_an_evaluation_set_cannot_judge_are_refused_with_its_key(
    keys: dict[str, object], row: dict[str, object], problem: str, tmp_path: Path
) -> None:
    config = case(tmp_path, eval={"sets": {"aime": {"path": str(tmp_path / "held_out.jsonl"), **keys}}})
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "?", "answer": "1", **row}])
    (found,) = checked(config).problems
    assert found.startswith("eval.sets.aime")
    assert problem in found


def test_a_tokenizer_that_loses_text_is_said_with_the_place(tmp_path: Path) -> None:
    config = case(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    report = checked(config)
    assert report.round_trip is not None
    assert (report.round_trip.num_texts, report.round_trip.num_changed) == (120, 80)
    assert any("'What is 0 + 0?' becomes 'what is 0 + 0?' at character 0" in text for text in report.warnings)


def test_what_one_part_refuses_keeps_no_other_part_from_being_checked(tmp_path: Path) -> None:
    config = case(
        tmp_path, grading={"verifier": "no_such_module:verify"}, eval={"sets": {"aime": {"path": "none.jsonl"}}}
    )
    report = checked(config)
    assert report.first_prompt is not None
    assert report.sets[0].prompts.num_rows == 40
    assert report.verifiers == []
    assert report.teachers == []
    assert len(report.problems) == 2
    assert "2 problems, 0 warnings" in to_text(report)


def test_rows_are_checked_as_far_as_they_can_be_without_a_tokenizer(tmp_path: Path) -> None:
    config = case(tmp_path)
    (tmp_path / "model" / "tokenizer.json").unlink()
    write_rows(tmp_path / "train.jsonl", [{"prompt": "?", "answer": []}])
    problems = checked(config).problems
    assert any("no tokenizer.json" in problem for problem in problems)
    assert any(f"{tmp_path / 'train.jsonl'}:1: answer=[]" in problem for problem in problems)


def test_skipped_and_long_rows_are_counted(tmp_path: Path) -> None:
    config = case(tmp_path, data={"on_bad_row": "skip", "max_prompt_tokens": 70})
    bad, long = {"prompt": "?", "answer": []}, {"prompt": "long " * 20, "answer": "1"}
    write_rows(tmp_path / "train.jsonl", [*rows(3), bad, long])
    report = checked(config)
    found = report.sets[0].prompts
    assert (found.num_rows, found.num_skipped, found.num_too_long) == (4, 1, 1)
    assert report.problems == []


def test_a_run_folder_that_is_there_keeps_the_check_for_the_run(tmp_path: Path) -> None:
    config = case(tmp_path)
    (tmp_path / "run").mkdir()
    first = to_data(checked(config))
    kept = sorted(path.name for path in (tmp_path / "run" / "data_check").iterdir())
    assert len(kept) == 3, "train, held-out, the sample of traces"
    assert to_data(checked(config)) == first


@pytest.mark.parametrize("override", [[], ["data.max_prompt_tokens=1"], ["nonsense=1"]])
def test_the_exit_status_is_that_of_bad_input_where_a_run_would_refuse(tmp_path: Path, override: list[str]) -> None:
    result = CliRunner().invoke(app, ["check", str(write_case(tmp_path)), *override, "--json"])
    assert result.exit_code == (Cause.BAD_INPUT.status if override else 0)
    if override != ["nonsense=1"]:
        data = json.loads(result.stdout)
        assert bool(data["problems"]) == bool(override)
        assert data["model"]["family"] == "qwen2"
