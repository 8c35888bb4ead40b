"""Held-out accuracy is never a number without samples, and missing samples are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.eval.scores import ItemScore, SetScore
from megatron_dypo.loop.evaluate import evaluate, score_metrics
from megatron_dypo.metrics.intervals import accuracy_interval, wilson_interval
from megatron_dypo.metrics.names import lookup
from megatron_dypo.types import Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import (
    PROMPTS,
    HeldOutPrompts,
    OneRank,
    aime,
    leader_of,
    make_config,
    make_run,
    mixed,
    right,
    silent,
)


def evaluated(
    folder: Path,
    *,
    plan: Callable[[int, dict[str, Any]], str] = lambda index, body: "ok",
    judge: Callable[[int, int], Verdict] = mixed,
    too_long: Sequence[int] = (),
    **options: Any,
) -> dict[str, float]:
    with FakeSGLang(plan) as fake:
        config = make_config(folder, eval=aime(samples_per_prompt=2, **options))
        run = make_run([fake.url], config, judge=judge)
        leader_of(run).held_out = {"aime": HeldOutPrompts(config.eval, too_long=too_long)}
        metrics = evaluate(run.evaluator, run.progress.step)
    for name in metrics:
        lookup(name)
    return metrics


def test_an_evaluation_counts_every_prompt_and_keeps_its_responses(tmp_path: Path) -> None:
    metrics = evaluated(tmp_path)
    assert metrics["eval/aime/accuracy"] == 0.5
    assert metrics["eval/aime/num_samples"] == 2 * PROMPTS
    assert metrics["eval/aime/num_prompts"] == PROMPTS
    assert metrics["eval/aime/num_lost"] == metrics["eval/aime/num_without_verdict"] == 0
    rows = [json.loads(line) for line in (tmp_path / "samples/eval/aime/step_000000.jsonl").read_text().splitlines()]
    assert [len(row["rollouts"]) for row in rows] == [2] * PROMPTS
    assert metrics["eval/aime/odd/num_samples"] == metrics["eval/aime/even/num_samples"] == PROMPTS


def test_each_response_is_asked_for_with_a_seed_that_stays(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        config = make_config(tmp_path, eval=aime(samples_per_prompt=2))
        run = make_run([fake.url], config)
        evaluate(run.evaluator, 0)
        evaluate(run.evaluator, 0)
    seeds = [body["sampling_params"]["sampling_seed"] for body in fake.requests]
    first, second = seeds[: 2 * PROMPTS], seeds[2 * PROMPTS :]
    assert len(set(first)) == 2 * PROMPTS
    assert sorted(first) == sorted(second)
    assert {body["sampling_params"]["n"] for body in fake.requests} == {1}


def test_a_source_has_the_accuracy_of_its_own_prompts(tmp_path: Path) -> None:
    metrics = evaluated(tmp_path, judge=lambda row, member: right(row, member) if row % 2 else mixed(row, member))
    assert metrics["eval/aime/odd/accuracy"] == 1.0
    assert metrics["eval/aime/even/accuracy"] == 0.5
    assert metrics["eval/aime/accuracy"] == 0.75


def test_without_a_response_there_is_no_accuracy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="megatron_dypo"):
        metrics = evaluated(tmp_path, plan=lambda index, body: "500")
    assert not any(name.endswith(("/accuracy", "_ratio", "/mean", "_low", "_high")) for name in metrics)
    assert metrics["eval/aime/num_samples"] == 0
    assert metrics["eval/aime/num_lost"] == 2 * PROMPTS
    assert "none of its 12 prompts was judged" in caplog.text


def test_prompts_over_the_limit_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="megatron_dypo"):
        metrics = evaluated(tmp_path, too_long=[0, 1, 2])
    assert metrics["eval/aime/num_lost"] == 2 * 3
    assert metrics["eval/aime/num_samples"] == 2 * (PROMPTS - 3)
    assert "6 responses of 12 prompts never came" in caplog.text


def test_a_response_without_a_verdict_is_in_no_accuracy(tmp_path: Path) -> None:
    metrics = evaluated(tmp_path, judge=lambda row, member: silent(row, member) if member else right(row, member))
    assert metrics["eval/aime/accuracy"] == 1.0
    assert metrics["eval/aime/num_samples"] == metrics["eval/aime/num_without_verdict"] == PROMPTS


def test_one_response_a_prompt_has_wilson_s_interval() -> None:
    assert accuracy_interval([1, 0, 1, 1], [1, 1, 1, 1]) == wilson_interval(0.75, 4)


def test_responses_that_only_repeat_each_other_make_an_interval_no_narrower() -> None:
    once = accuracy_interval([1] * 30 + [0] * 70, [1] * 100)
    often = accuracy_interval([8] * 30 + [0] * 70, [8] * 100)
    assert often[0] == pytest.approx(once[0], abs=0.01)
    assert often[1] == pytest.approx(once[1], abs=0.01)


def test_responses_that_differ_within_a_prompt_make_an_interval_narrower() -> None:
    low, high = accuracy_interval([4] * 100, [8] * 100)
    assert high - low < 0.1 < 0.19 < wilson_interval(0.5, 100)[1] - wilson_interval(0.5, 100)[0]


def test_replicas_scores_add_up() -> None:
    one = ItemScore(source="s", correct=1, samples=2, truncated=1, tokens=7)
    nothing = ItemScore(source="s", lost=2)
    metrics = score_metrics("set", SetScore(items=(one, nothing)) + SetScore(items=(one, one)))
    assert (metrics["eval/set/num_prompts"], metrics["eval/set/num_lost"]) == (4, 2)
    assert (metrics["eval/set/accuracy"], metrics["eval/set/truncated_ratio"]) == (0.5, 0.5)
    assert metrics["eval/set/response_len/mean"] == 3.5
    assert metrics["eval/set/pass@2"] == 1.0
    assert "eval/set/maj@2" not in metrics, "nobody says which answers the responses state"


def test_several_responses_a_prompt_have_pass_at_k_and_a_majority(tmp_path: Path) -> None:
    metrics = evaluated(tmp_path)
    assert metrics["eval/aime/pass@2"] == 1.0, "one of two responses to each prompt is right"
    assert metrics["eval/aime/maj@2"] == 0.5, "the other states an answer of its own: a tie"


def test_replicas_share_the_prompts_and_count_those_over_the_limit_once(tmp_path: Path) -> None:
    found = []
    for rank in (0, 1):
        with FakeSGLang() as fake:
            config = make_config(tmp_path, eval=aime(samples_per_prompt=1))
            run = make_run([fake.url], config, ranks=OneRank(replica=rank, replicas=2))
            leader_of(run).held_out = {"aime": HeldOutPrompts(config.eval, too_long=[0, 1, 2])}
            metrics = evaluate(run.evaluator, run.progress.step)
            asked = sorted(body["input_ids"][-1] - 100 for body in fake.requests)
        found.append((metrics["eval/aime/num_lost"], metrics["eval/aime/num_samples"], asked))
    assert found == [(2, 4, [4, 6, 8, 10]), (1, 5, [3, 5, 7, 9, 11])]
