"""Samples of teachers' traces that the verifier judges, and the table of teachers at a run's start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.prompts import PromptDataset, PromptStream, open_prompts
from megatron_dypo.data.row_check.verdicts import TraceVerdicts, wrong_traces
from megatron_dypo.data.teacher_table import teacher_table
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.types import Prompt

SLASHED = "Qwen/Qwen3-235B-A22B"
DATA = DataConfig(drop_wrong_traces=True)


def _row(number: int) -> dict[str, Any]:
    traces = {SLASHED: "It is 99." if number % 5 == 0 else f"It is {number}."}
    if number % 4:
        traces["r1"] = f"It is {number}."
    return {"prompt": f"What is {number}?", "answer": str(number), "traces": traces}


class Judge:
    """A verifier that accepts a response that ends with the answer, and counts."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Prompt, str]] = []

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[bool | None]:
        self.pairs += pairs
        return [response == f"It is {prompt.answer}." for prompt, response in pairs]


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


def _open(tokenizer: Tokenizer, tmp_path: Path, rows: list | None = None, data: DataConfig = DATA) -> PromptDataset:
    path = tmp_path / "x.jsonl"
    found = [_row(number) for number in range(20)] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return open_prompts([path], data, tokenizer, cache_dir=tmp_path / "run")


def test_a_sample_judges_that_many_traces_of_each_teacher_and_is_kept_under_its_own_key(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = DataConfig()
    dataset, judge = _open(tokenizer, tmp_path, data=data), Judge()

    def sampled(limit: int | None, seed: int = 0) -> TraceVerdicts:
        return wrong_traces(
            dataset,
            judge,
            tokenizer=tokenizer,
            data=data,
            verifier_key="judge",
            limit_per_teacher=limit,
            seed=seed,
        )

    found = sampled(4)
    judged = dataset.checked.trace_teacher[found.codes != -2]
    assert np.bincount(judged).tolist() == [4, 4]
    assert found.is_sample
    assert len(judge.pairs) == 8
    assert sampled(4).codes.tolist() == found.codes.tolist()
    assert len(judge.pairs) == 8, "kept"
    assert sampled(4, seed=1).codes.tolist() != found.codes.tolist()
    whole = sampled(None)
    assert not whole.is_sample
    assert all(code in (-2, other) for code, other in zip(found.codes, whole.codes, strict=True))
    # A sample larger than the number of traces is all of them.
    before = len(judge.pairs)
    assert not sampled(1000).is_sample
    assert len(judge.pairs) == before


def test_no_trace_is_dropped_by_a_sample(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = _open(tokenizer, tmp_path)
    # All of the sample is wrong. That does not show that the rest is.
    verdicts = wrong_traces(
        dataset,
        lambda pairs: [False] * len(pairs),
        tokenizer=tokenizer,
        data=DATA,
        verifier_key="no",
        limit_per_teacher=2,
    )
    with pytest.raises(AssertionError, match="only a sample"):
        PromptStream(dataset, tokenizer, DATA, 1, verdicts=verdicts).take(0, 1)


def test_verdicts_without_a_key_are_not_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset, judge = _open(tokenizer, tmp_path), Judge()
    for _ in range(2):
        wrong_traces(dataset, judge, tokenizer=tokenizer, data=DATA, verifier_key="")
    assert len(judge.pairs) == 2 * 35


def test_the_table_has_a_line_for_each_teacher_with_the_interval_of_its_accuracy(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = _open(tokenizer, tmp_path)
    verdicts = wrong_traces(dataset, Judge(), tokenizer=tokenizer, data=DATA, verifier_key="judge")
    header, slashed, r1 = teacher_table(dataset, DATA, verdicts)
    assert header.split()[:4] == ["teacher", "traces", "coverage", "median"]
    low, high = wilson_interval(0.8, 20)
    assert slashed.startswith(f"{SLASHED}      20    100.0%")
    assert slashed.endswith(f"80.0% ({low:.1%} to {high:.1%})      20")
    assert r1.split()[:3] == ["r1", "15", "75.0%"]
    _, unjudged, _ = teacher_table(dataset, DATA)
    assert "not judged" in unjudged
    assert "(not in data.teachers)" in teacher_table(dataset, DataConfig(teachers=("r1",)), verdicts)[1]
    bare = _open(tokenizer, tmp_path, [{"prompt": "a", "answer": "b"}])
    assert teacher_table(bare, DataConfig()) == []
