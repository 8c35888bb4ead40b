"""Whole runs that cannot go on: each ends with its own status, says why, and exports nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.ending import Cause
from tests.support.e2e.commands import steps_of, train
from tests.support.e2e.parity_task import write_task

SFT: dict[str, Any] = {"objective": {"name": "sft"}}


def ended(folder: Path, config: Path, cause: Cause, *overrides: str) -> tuple[str, dict[str, Any]]:
    """Return the output and the status file of a run that must end for ``cause``."""
    output = train(config, *overrides, status=cause.status)
    record = json.loads((folder / "run" / "status.json").read_text())
    assert (record["state"], record["cause"], record["status"]) == ("ended", cause.label, cause.status)
    assert record["message"] in output
    assert "Traceback" not in output
    assert not (folder / "run" / "hf").exists()
    return output, record


@pytest.mark.slow
def test_groups_that_never_come_back_end_the_run_with_the_last_reason(tmp_path: Path) -> None:
    # The deadline is so short that no answer comes in time on any machine.
    config = write_task(tmp_path, rollout={"request_deadline_s": 0.0001, "retries": 0})
    output, record = ended(tmp_path, config, Cause.GROUPS_LOST)
    assert "request_deadline_s=0.0001" in record["message"]
    assert record["counts"]["dropped_incomplete"] == record["counts"]["drawn"] > 0
    assert output.count("dropped the group of prompt") < 10, "a repeated warning is written once, with a count"
    # The same in the background, with a log that does not grow without end.
    again = train(config, "rollout.mode=async", "objective.importance.cap=2.0", status=Cause.GROUPS_LOST.status)
    assert len(again.splitlines()) < 200


@pytest.mark.slow
def test_a_verifier_that_always_raises_ends_the_run_with_its_error(tmp_path: Path) -> None:
    config = write_task(tmp_path, grading={"verifier": "tests.support.e2e.parity_task:raises"})
    _, record = ended(tmp_path, config, Cause.NO_VERDICTS)
    assert "KeyError: 'no such entry'" in record["message"]
    assert record["counts"]["dropped_no_verdict"] == record["counts"]["drawn"] == 8, "after one round"


def test_a_server_that_cannot_start_ends_the_run_with_the_end_of_its_log(tmp_path: Path) -> None:
    config = write_task(tmp_path, rollout={"servers": {"extra_args": ["--no-such-flag"], "max_restarts": 0}})
    _, record = ended(tmp_path, config, Cause.SERVERS_GONE)
    assert "unrecognized arguments: --no-such-flag" in record["message"]


def test_a_weight_that_is_not_finite_ends_the_run_before_anything_is_pushed(tmp_path: Path) -> None:
    config = write_task(tmp_path, **SFT)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    _, record = ended(tmp_path, config, Cause.NOT_FINITE)
    assert "decoder.layers.1.mlp.linear_fc2.weight holds a value that is not finite" in record["message"]
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_resumed_run_has_its_data_its_books_and_the_configs_learning_rate(tmp_path: Path) -> None:
    config = write_task(tmp_path, run={"steps": 4}, optimizer={"lr": 1e-3}, **SFT)
    train(config, "run.steps=2")
    run_dir = tmp_path / "run"
    before = load_file(run_dir / "hf" / "model.safetensors")

    data = tmp_path / "train.jsonl"
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    output = train(config, status=Cause.BAD_INPUT.status)
    assert "this run has other inputs than the run that is resumed" in output
    assert "train.jsonl: has the same number of rows (48) with another content" in output
    output = train(config, "optimizer.lr=1e-9", "run.allow_changed=[data]")
    assert "allowed by run.allow_changed" in output
    after = load_file(run_dir / "hf" / "model.safetensors")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved < 1e-7, "two steps at 1e-9"
    records = [record for step, record in sorted(steps_of(run_dir).items()) if step > 0]
    assert [record["train/lr"] for record in records[2:]] == [1e-9, 1e-9]
    for name in ("ledger/drawn", "ledger/trained_sft"):
        assert [record[name] for record in records] == [8.0, 16.0, 24.0, 32.0]

    written = (run_dir / "metrics.jsonl").read_text()
    assert "resuming from" in train(config, "run.allow_changed=[data]"), "a finished run has nothing to do"
    assert (run_dir / "metrics.jsonl").read_text() == written
