"""The quickstart's problems, teachers, tokenizer and model."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import run
from model import HF_CONFIG, VOCABULARY, write_model
from task import TEACHERS, Addition, draw_problems, write_problems

from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.read import HFReader


def is_right(teacher: str, problem: Addition) -> bool:
    return verify_exact(TEACHERS[teacher](problem), str(problem.answer))


def test_traces_are_the_documented_ones() -> None:
    problem = Addition(478, 964)
    assert problem.prompt == "478+964="
    assert TEACHERS["columns"](problem) == "8+4=12,7+6+1=14,4+9+1=14####1442"
    assert TEACHERS["glance"](problem) == "13,13,12####1442"


def test_columns_errs_only_where_nine_meets_nine_and_a_carry() -> None:
    for first, second in itertools.product(range(10, 100), repeat=2):
        occasion = first // 10 == second // 10 == 9 and first % 10 + second % 10 >= 10
        assert is_right("columns", Addition(first, second)) is not occasion


def test_glance_errs_only_where_a_carry_passes_through_a_nine() -> None:
    for first, second in itertools.product(range(10, 100), repeat=2):
        occasion = first // 10 + second // 10 == 9 and first % 10 + second % 10 >= 10
        assert is_right("glance", Addition(first, second)) is not occasion


def test_teachers_are_mostly_right_and_columns_is_the_longer() -> None:
    problems = draw_problems(run.HELDOUT, random.Random(3))
    for teacher in TEACHERS:
        assert 0.8 < sum(is_right(teacher, problem) for problem in problems) / len(problems) < 1
    assert all(len(TEACHERS["columns"](problem)) > len(TEACHERS["glance"](problem)) for problem in problems)


@pytest.mark.parametrize(("first", "second", "carries"), [(123, 456, 0), (478, 964, 3), (199, 801, 3), (190, 130, 1)])
def test_carries_are_counted_also_those_that_pass_through_a_nine(first: int, second: int, carries: int) -> None:
    assert Addition(first, second).num_carries == carries


def test_problems_are_all_different_and_have_the_carries_asked_for() -> None:
    heldout = draw_problems({0: 30, 3: 20}, random.Random(1))
    train = draw_problems({0: 50, 3: 100}, random.Random(1), exclude=heldout)
    assert len({*heldout, *train}) == 200
    assert sorted(problem.num_carries for problem in heldout) == [0] * 30 + [3] * 20


def test_carries_that_no_problem_has_are_an_error() -> None:
    with pytest.raises(ValueError, match="found only 0 additions with 4 carries"):
        draw_problems({4: 2}, random.Random(1))


def test_rows_have_an_answer_and_both_traces(tmp_path: Path) -> None:
    write_problems(tmp_path / "data" / "p.jsonl", [Addition(112, 134)])
    (row,) = map(json.loads, (tmp_path / "data" / "p.jsonl").read_text().splitlines())
    assert (row["prompt"], row["answer"], row["source"]) == ("112+134=", "246", "0 carries")
    assert set(row["traces"]) == {"columns", "glance"}


def test_tokenizer_gives_back_every_prompt_and_trace_character_by_character(tmp_path: Path) -> None:
    write_model(tmp_path, seed=1)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(VOCABULARY)
    for problem in draw_problems({2: 50}, random.Random(1)):
        for text in (problem.prompt, *(teacher(problem) for teacher in TEACHERS.values())):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.replace("####", "#"))
            assert not {tokenizer.eos_id, HF_CONFIG["pad_token_id"]} & set(ids)


def test_model_folder_is_complete_of_about_a_million_parameters_and_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert 0.9e6 < write_model(tmp_path / name, seed) < 1.1e6
    HFReader(tmp_path / "a").check_complete(load_architecture(tmp_path / "a"))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
