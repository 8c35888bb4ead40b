"""The examples, run as their READMEs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dypo.metrics.records import read_metrics
from tests.support.e2e.commands import REPOSITORY, python


def test_gsm8k_with_a_sentencepiece_tokenizer_learns_from_both_teachers(tmp_path: Path) -> None:
    example = REPOSITORY / "examples" / "gsm8k_tiny"
    python(example / "prepare.py", "--tokenizer", "sentencepiece", "--out", tmp_path / "input")
    overrides = [
        f"run.dir={tmp_path}/run",
        f"model.hf_path={tmp_path}/input/model",
        f"data.prompts=[{tmp_path}/input/data/train.jsonl]",
        f"eval.sets.gsm8k.path={tmp_path}/input/data/test.jsonl",
        "run.steps=3",
        "eval.max_prompts=8",
    ]
    python("-m", "megatron_dypo.cli", "train", example / "dypo.yaml", *overrides)
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["step"]]
    assert len(steps) == 3
    assert steps[-1]["train/sft_nll"] < steps[0]["train/sft_nll"]
    assert {name for record in steps for name in record if name.startswith("teacher/")} == {
        "teacher/solutions/share",
        "teacher/calculations/share",
    }
    assert (tmp_path / "run" / "hf" / "tokenizer.model").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_at_least_doubles_the_accuracy_in_twelve_minutes(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    printed = python(REPOSITORY / "examples" / "quickstart" / "run.py", "--out", out, deadline_s=1700)
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert after >= 2 * before > 0
    assert summary["accuracy_after_interval"][0] > before
    assert summary["tiers_last"]["hard"] < summary["tiers_first"]["hard"]
    assert all(summary["tiers_first"][tier] > 0 for tier in ("easy", "mid", "hard"))
    assert summary["overhead"] <= 0.05
    assert summary["refit"] <= 0.1
    assert summary["seconds"] <= 12 * 60
    assert "held-out accuracy" in printed


@pytest.mark.slow
def test_two_steps_through_the_python_api_learn_from_teachers(tmp_path: Path) -> None:
    printed = python(REPOSITORY / "examples" / "from_python.py", "--out", tmp_path)
    records = {record["step"]: record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(records) == [0, 1, 2]
    assert records[2]["gate/hard"] > 0.9
    assert records[2]["train/sft_nll"] < records[1]["train/sft_nll"]
    assert "learned from" in printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
