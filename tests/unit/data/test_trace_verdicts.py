"""Teachers' traces: the verifier's verdicts, the traces that are used, and the table at a run's start."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.prompts import PromptDataset, PromptStream, open_prompts
from megatron_dypo.data.row_check.verdicts import wrong_traces
from megatron_dypo.data.statistics import prompt_statistics, teacher_statistics
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from megatron_dypo.types import Prompt
from tests.support.tiny_tokenizers import TEMPLATE, variant

SLASHED = "Qwen/Qwen3-235B-A22B"


def _row(number: int) -> dict[str, Any]:
    right, wrong = f"It is {number}.<|im_end|>\n", "It is 99."
    traces = {SLASHED: wrong if number % 5 == 0 else right, "r1": right}
    if number % 2:
        traces["r1"] = "crash" if number == 7 else "so " * 60
    if number % 4 == 0:
        del traces["r1"]
    return {"prompt": f"What is {number}?", "answer": str(number), "traces": traces}


ROWS = [_row(number) for number in range(20)]
DATA = DataConfig(max_trace_tokens=40, drop_wrong_traces=True)


class Judge:
    """A verifier that accepts a response that ends with the answer, and fails on ``crash``."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Prompt, str]] = []

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[bool | None]:
        self.pairs += pairs
        return [None if response == "crash" else response == f"It is {prompt.answer}." for prompt, response in pairs]


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


def _open(tokenizer: Tokenizer, tmp_path: Path, rows: list = ROWS, data: DataConfig = DATA) -> PromptDataset:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_prompts([path], data, tokenizer, cache_dir=tmp_path / "run")


def test_wrong_traces_are_left_out_of_draws_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, judge = _open(tokenizer, tmp_path), Judge()
    verdicts = wrong_traces(dataset, judge, tokenizer=tokenizer, data=DATA, verifier_key="judge")
    assert "no verdict on 1 of 26 teachers' traces: they are used" in caplog.text
    stream = PromptStream(dataset, tokenizer, DATA, 1, verdicts=verdicts)
    prompts, drops = stream.take(0, 40)
    assert len(prompts) == 40
    for prompt in prompts:
        number = int(prompt.answer)
        assert (SLASHED in prompt.traces) == (number % 5 != 0)
        assert ("r1" in prompt.traces) == (number == 7 or number % 4 == 2)
    assert (drops.wrong_traces, drops.traces, drops.prompts) == (2 * 4, 2 * 9, 0)
    # Without the option no trace is left out.
    kept, drops = PromptStream(dataset, tokenizer, DataConfig(max_trace_tokens=40), 1).take(0, 40)
    assert all(SLASHED in prompt.traces for prompt in kept)
    assert drops.wrong_traces == 0


def test_the_verifier_gets_a_trace_as_the_response_that_it_would_be(bpe_folder: Path, tmp_path: Path) -> None:
    thinking = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
    tokenizer = load_tokenizer(variant(bpe_folder, tmp_path / "t", chat_template=thinking))
    rows = [{"prompt": "a", "answer": "b", "source": "s", "traces": {"r1": "<think>\nOne.</think>2<|im_end|>\n"}}]
    judge = Judge()
    wrong_traces(
        _open(tokenizer, tmp_path, rows, DataConfig()), judge, tokenizer=tokenizer, data=DataConfig(), verifier_key="k"
    )
    ((prompt, response),) = judge.pairs
    assert response == "One.</think>2"
    assert (prompt.prompt_id, prompt.answer, prompt.source) == ("x.jsonl:1", "b", "s")
    assert prompt.tokens.tolist() == tokenizer.render("a", True)


def test_verdicts_are_kept_for_the_same_verifier_and_the_same_traces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    judge = Judge()

    def judged(key: str = "a", rows: list = ROWS, **data: Any) -> int:
        before = len(judge.pairs)
        config = DataConfig(max_trace_tokens=40, **data)
        verdicts = wrong_traces(
            _open(tokenizer, tmp_path, rows, config), judge, tokenizer=tokenizer, data=config, verifier_key=key
        )
        assert (verdicts.codes == -2).sum() == len(verdicts.codes) - (verdicts.codes != -2).sum()
        return len(judge.pairs) - before

    assert judged() == 26
    assert judged() == 0
    assert judged("b") == 26
    assert judged(teachers=("r1",)) == 6
    assert judged(rows=ROWS[:10]) > 0
    assert judged() == 0


def test_traces_of_prompts_that_are_too_long_are_not_judged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [ROWS[1], {**ROWS[2], "prompt": "long " * 300}]
    data, judge = DataConfig(max_prompt_tokens=100), Judge()
    verdicts = wrong_traces(
        _open(tokenizer, tmp_path, rows, data), judge, tokenizer=tokenizer, data=data, verifier_key="judge"
    )
    assert {prompt.answer for prompt, _ in judge.pairs} == {"1"}
    assert sorted(verdicts.codes.tolist()) == [-2, -2, 0, 1]


def test_a_verifier_that_calls_every_trace_wrong_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = _open(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="calls each of the 26 teachers' traces wrong"):
        wrong_traces(dataset, lambda pairs: [False] * len(pairs), tokenizer=tokenizer, data=DATA, verifier_key="no")
    # If wrong traces are not dropped, they are only reported.
    keep = DataConfig(max_trace_tokens=40)
    wrong_traces(dataset, lambda pairs: [False] * len(pairs), tokenizer=tokenizer, data=keep, verifier_key="no")


def test_draws_refuse_to_begin_without_the_verdicts_that_they_need(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = PromptStream(_open(tokenizer, tmp_path), tokenizer, DATA, 1)
    with pytest.raises(AssertionError, match="nobody judged"):
        stream.take(0, 1)
    assert len(stream.all()[0]) == 20, "an evaluation has no traces"


def test_the_table_of_teachers_has_coverage_lengths_and_accuracy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = _open(tokenizer, tmp_path)
    verdicts = wrong_traces(dataset, Judge(), tokenizer=tokenizer, data=DATA, verifier_key="judge")
    slashed, r1 = teacher_statistics(dataset, DATA, verdicts)
    assert (slashed.teacher, slashed.num_traces, slashed.coverage) == (SLASHED, 20, 1.0)
    assert (slashed.num_right, slashed.num_wrong, slashed.accuracy) == (16, 4, 0.8)
    assert (r1.num_traces, r1.coverage, r1.num_too_long) == (15, 0.75, 9)
    assert (r1.num_right, r1.num_wrong, r1.num_no_verdict, r1.accuracy) == (5, 0, 1, 1.0)
    lengths = sorted(int(dataset.checked.trace_tokens[dataset.trace_indices(row)[SLASHED]]) for row in range(20))
    assert slashed.lengths is not None
    assert (slashed.lengths.shortest, slashed.lengths.longest) == (lengths[0], lengths[-1])
    assert slashed.lengths.median in lengths[9:11]
    (unjudged, _) = teacher_statistics(dataset, DataConfig(teachers=("r1",)))
    assert (unjudged.is_used, unjudged.accuracy) == (False, None)


def test_the_table_of_teachers_is_of_good_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{**row, "id": "again" if number < 3 else f"u{number}"} for number, row in enumerate(ROWS[:5])]
    data = DataConfig(on_bad_row="skip")
    slashed, r1 = teacher_statistics(_open(tokenizer, tmp_path, rows, data), data)
    # Rows 1 and 2 have the id of row 0; rows 0 and 4 have no trace of r1.
    assert (slashed.num_traces, slashed.coverage) == (3, 1.0)
    assert (r1.num_traces, r1.coverage) == (1, 1 / 3)


def test_the_table_of_prompts_counts_what_is_left_out(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    rows = [*ROWS, {"prompt": "bad"}, {"prompt": "long " * 300, "answer": "1"}]
    data = DataConfig(max_prompt_tokens=100, max_trace_tokens=40, teachers=("r1",), on_bad_row="skip")
    found = prompt_statistics(_open(tokenizer, tmp_path, rows, data), data)
    assert (found.num_rows, found.num_skipped, found.num_too_long) == (21, 1, 1)
    assert found.num_without_trace == 21 - 6
    assert found.lengths.longest > 300


def test_data_without_traces_has_an_empty_table(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "b"}] * 3
    dataset, judge = _open(tokenizer, tmp_path, rows), Judge()
    verdicts = wrong_traces(dataset, judge, tokenizer=tokenizer, data=DATA, verifier_key="judge")
    assert (verdicts.codes.tolist(), judge.pairs) == ([], [])
    assert teacher_statistics(dataset, DATA, verdicts) == []
    assert prompt_statistics(dataset, DATA).num_without_trace == 3
    prompts, drops = PromptStream(dataset, tokenizer, DATA, 1, verdicts=verdicts).take(0, 3)
    assert (len(prompts), drops.wrong_traces) == (3, 0)
