"""The quickstart's stages, its summary and its configs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import run
from whole_job.stages import Stages
from whole_job.summary import Summary, closing_words, summarize

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.metrics.intervals import wilson_interval


def write_metrics(path: Path, num_steps: int) -> Path:
    rows: list[dict[str, float]] = [
        {"step": 0, "time": 0.0, "eval/heldout/accuracy": 0.25, "eval/heldout/num_samples": 400}
    ]
    for step in range(1, num_steps + 1):
        easy = step / num_steps
        tiers = {"gate/easy": easy, "gate/mid": 0.0, "gate/hard": 1 - easy}
        timings = {"timing_s/step": 2.0, "timing_s/other": 0.1, "timing_s/refit": 0.04}
        rows.append({"step": step, "time": 1.0, **tiers, **timings})
    if num_steps:
        rows[-1] |= {"eval/heldout/accuracy": 0.75, "eval/heldout/num_samples": 400}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_summary_takes_the_first_and_the_last_evaluation_and_the_tiers_at_both_ends(tmp_path: Path) -> None:
    summary = summarize(write_metrics(tmp_path / "metrics.jsonl", 20), eval_set="heldout", seconds=9.0)
    assert (summary.accuracy_before, summary.accuracy_after, summary.steps, summary.num_heldout) == (
        0.25,
        0.75,
        20,
        400,
    )
    assert summary.tiers_first == pytest.approx({"easy": 0.15, "mid": 0.0, "hard": 0.85})
    assert summary.tiers_last == pytest.approx({"easy": 0.9, "mid": 0.0, "hard": 0.1})
    assert summary.overhead == pytest.approx(0.05)
    assert summary.refit == pytest.approx(0.02)
    assert summary.seconds == 9.0
    content = json.loads(json.dumps(summary.as_json()))
    assert content["accuracy_after_interval"] == pytest.approx(wilson_interval(0.75, 400))
    words = closing_words(summary, run.DEFAULT_OUT, "quickstart")
    for text in ("25.0%", "75.0%", "runs/quickstart/dypo/report.html", "runs/quickstart/dypo/hf", "hard  85%"):
        assert text in words


def test_a_run_without_a_second_evaluation_has_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 evaluations of 'heldout' and 0 graded steps"):
        summarize(write_metrics(tmp_path / "metrics.jsonl", 0), eval_set="heldout", seconds=1.0)


@pytest.mark.parametrize(("successes", "total"), [(0, 50), (13, 50), (50, 50), (111, 400)])
def test_wilson_interval_is_where_the_normal_test_is_just_not_significant(successes: int, total: int) -> None:
    low, high = wilson_interval(successes / total, total)
    assert 0 <= low <= successes / total <= high <= 1
    for edge in (low, high):
        if 0 < edge < 1:
            z = (successes / total - edge) / math.sqrt(edge * (1 - edge) / total)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_a_complete_stage_is_not_repeated_and_its_time_still_counts(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Stages(tmp_path / "stages.json", seed=1)
    first.run("one", lambda: calls.append("one"))

    def broken_off() -> None:
        calls.append("broken off")
        raise SystemExit

    with pytest.raises(SystemExit):
        first.run("two", broken_off)

    second = Stages(tmp_path / "stages.json", seed=1)
    assert second.seconds == first.seconds
    second.run("one", lambda: calls.append("one again"))
    second.run("two", lambda: calls.append("two"))
    assert calls == ["one", "broken off", "two"]
    assert second.seconds > first.seconds


def test_a_folder_of_another_seed_is_refused(tmp_path: Path) -> None:
    Stages(tmp_path / "stages.json", seed=1).run("one", lambda: None)
    with pytest.raises(ValueError, match=r"--seed 2: .* is of seed 1"):
        Stages(tmp_path / "stages.json", seed=2)


def test_inputs_are_disjoint_and_the_same_each_time(tmp_path: Path) -> None:
    run.make_inputs(tmp_path / "a", seed=1)
    run.make_inputs(tmp_path / "b", seed=1)
    prompts = {}
    for name in ("warmup", "train", "heldout"):
        text = (tmp_path / "a" / "data" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / "data" / f"{name}.jsonl").read_text()
        prompts[name] = {json.loads(line)["prompt"] for line in text.splitlines()}
    assert len(prompts["heldout"]) == sum(run.HELDOUT.values())
    assert not prompts["heldout"] & (prompts["warmup"] | prompts["train"])
    assert not prompts["warmup"] & prompts["train"]


@pytest.mark.parametrize("stage", ["warmup", "dypo"])
def test_configs_are_valid_and_fit_the_folder_that_the_script_fills(stage: str, tmp_path: Path) -> None:
    path = run.ROOT / run.HERE / f"{stage}.yaml"
    assert run.overrides(run.DEFAULT_OUT, run.DEFAULT_SEED, stage) == []
    config = load_config(path)
    moved = load_config(path, run.overrides(tmp_path, 7, stage))
    assert moved.run.seed == 7
    for name in ("run.dir", "model.hf_path", "data.prompts", "eval.sets"):
        section, field = name.split(".")
        here, there = (getattr(getattr(tree, section), field) for tree in (config, moved))
        assert str(here).replace(str(run.DEFAULT_OUT), str(tmp_path)) == str(there)


def test_summary_fields_are_the_documented_ones() -> None:
    documented = {"accuracy_before", "accuracy_after", "accuracy_before_interval", "accuracy_after_interval"}
    assert documented | {"tiers_first", "tiers_last", "seconds"} <= set(Summary.__dataclass_fields__)
