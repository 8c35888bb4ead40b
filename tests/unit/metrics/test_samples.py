"""The samples of a run, written and read back."""

import dataclasses

import numpy as np
import pytest

from megatron_dypo.metrics.samples import (
    SampleLog,
    SampleRow,
    discard_samples,
    read_samples,
    sample_row,
    sample_steps,
)
from megatron_dypo.types import DropReason, GradedGroup, Prompt, Rollout, Tier, Treatment, Verdict
from tests.support.graded_groups import graded


def _row(step: int, prompt_id: str) -> SampleRow:
    return SampleRow(
        step=step,
        prompt_id=prompt_id,
        source="s",
        prompt="1+1=",
        answer="2",
        tier="hard",
        treatment="distill",
        teacher="t",
        policy_version=step,
        rollouts=[],
        trace="é\u2028",
        trace_verdict={"is_correct": True, "reward": 0.5, "error": None},
        dropped=None,
    )


def _ids(run_dir, steps=None):
    return [row["prompt_id"] for row in read_samples(run_dir, steps)]


def test_rows_read_back_as_written(tmp_path):
    rows = [_row(12, "a"), _row(12, "b")]
    path = SampleLog(tmp_path).write(12, rows)
    assert path == tmp_path / "samples" / "step_000012.jsonl"
    assert list(read_samples(tmp_path)) == rows


def test_replicas_are_merged_in_order_of_step_then_rank(tmp_path):
    for shard in (10, 2):
        for step in (3, 1):
            SampleLog(tmp_path, shard=shard).write(step, [_row(step, f"{step}.{shard}")])
    assert (tmp_path / "samples" / "step_000003.00010.jsonl").exists()
    assert _ids(tmp_path) == ["1.2", "1.10", "3.2", "3.10"]
    assert _ids(tmp_path, [3]) == ["3.2", "3.10"]
    assert sample_steps(tmp_path) == [1, 3]


def test_a_step_written_again_replaces_the_file_and_leaves_no_other(tmp_path):
    log = SampleLog(tmp_path)
    log.write(1, [_row(1, "old"), _row(1, "old")])
    log.write(1, [_row(1, "new")])
    assert _ids(tmp_path) == ["new"]
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_max_rows_keeps_the_first(tmp_path):
    SampleLog(tmp_path, max_rows=2).write(0, [_row(0, name) for name in "abc"])
    assert _ids(tmp_path) == ["a", "b"]


def test_discard_removes_later_steps_of_every_replica(tmp_path):
    for shard in (None, 0, 1):
        for step in range(3):
            SampleLog(tmp_path, shard=shard).write(step, [_row(step, "p")])
    discard_samples(tmp_path, from_step=1)
    assert sample_steps(tmp_path) == [0]


def test_a_damaged_line_is_named(tmp_path):
    path = SampleLog(tmp_path).write(4, [_row(4, "a")])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"step_000004\.jsonl:2"):
        list(read_samples(tmp_path))


def test_a_run_without_samples_has_none(tmp_path):
    assert list(read_samples(tmp_path)) == []


def test_the_row_of_a_graded_group_pairs_rollouts_with_verdicts():
    def rollout(text, version):
        tokens = np.arange(len(text), dtype=np.int32)
        logp = np.zeros(len(text), dtype=np.float32)
        return Rollout(tokens=tokens, logp=logp, text=text, finish="stop", policy_version=version)

    prompt = Prompt(prompt_id="p1", visit=0, order=5, tokens=np.zeros(3, np.int32), text="q", answer="2", source="sums")
    graded = GradedGroup(
        prompt=prompt,
        rollouts=(rollout("two", 4), rollout("three", 3)),
        verdicts=(Verdict(is_correct=True, reward=1.0), Verdict(is_correct=False, reward=-0.5, error="deadline")),
        tier=Tier.MID,
    )
    row = sample_row(6, graded, Treatment.REINFORCE)
    assert (row["tier"], row["treatment"], row["policy_version"], row["teacher"]) == ("mid", "reinforce", 3, None)
    assert [(r["text"], r["is_correct"], r["reward"], r["num_tokens"], r["error"]) for r in row["rollouts"]] == [
        ("two", True, 1.0, 3, None),
        ("three", False, -0.5, 5, "deadline"),
    ]


def test_a_row_shows_the_verdict_on_its_trace():
    plain = graded(0, [True, False])
    judged = dataclasses.replace(plain, trace_verdict=Verdict(is_correct=False, reward=-0.25, error="deadline"))
    row = sample_row(1, judged, Treatment.MIX, teacher="a", trace="so")
    assert row["trace_verdict"] == {"is_correct": False, "reward": -0.25, "error": "deadline"}
    assert sample_row(1, plain, Treatment.MIX, teacher="a", trace="so")["trace_verdict"] is None


def test_a_response_that_is_no_unicode_and_an_answer_that_is_no_text_are_kept(tmp_path):
    prompt = graded(0, [True]).prompt
    group = dataclasses.replace(
        graded(0, [True]), prompt=dataclasses.replace(prompt, answer={"x": [1, 2]}, text="\ud83d")
    )
    SampleLog(tmp_path).write(1, [sample_row(1, group, Treatment.DROP, dropped=DropReason.EASY)])
    (row,) = read_samples(tmp_path)
    assert (row["answer"], row["prompt"], row["dropped"]) == ({"x": [1, 2]}, "\ud83d", "easy")
