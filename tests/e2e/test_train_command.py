"""`megatron-dypo train` as a user runs it: real ranks, real SGLang, real checkpoints."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.metrics.samples import read_samples
from tests.support.e2e.commands import COMMAND, DEADLINE_S, start, steps_of, train, wait_until
from tests.support.e2e.parity_task import write_task
from tests.support.hf_models import import_transformers

MAX_GAP = 1e-3
"""Largest mean |SGLang's log-prob − the trainer's| after a refit, in fp32."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Make a DYPO run at TP2×PP2 with evaluation; return it with its output."""
    folder = tmp_path_factory.mktemp("dypo")
    config = write_task(
        folder,
        run={"steps": 3},
        parallel={"tensor": 2, "pipeline": 2},
        rollout={"servers": {"per_node": 2}},
        objective={"kl_coef": 0.01},
        eval={"sets": {"held_out": {"path": str(folder / "held_out.jsonl")}}},
    )
    return folder / "run", train(config)


def test_run_folder_holds_everything(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    assert sorted(path.name for path in (run_dir / "hf").glob("model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "logs/rank_00003.log", "logs/sglang_1.log"):
        assert (run_dir / name).exists(), name
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["objective"]["alpha"] == 0.5
    assert output.count("| reward") == 3


def test_each_rollout_batch_comes_from_the_weights_just_pushed(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    metrics = steps_of(run_dir)
    assert sorted(metrics) == [0, 1, 2, 3]
    for step in (1, 2, 3):
        assert metrics[step]["rollout/policy_version"] == step - 1
        assert metrics[step]["train/train_rollout_logprob_abs_diff"] <= MAX_GAP
        assert metrics[step]["train/grad_norm"] > 0
        tiers = [metrics[step][f"gate/{tier}"] for tier in ("easy", "mid", "hard")]
        assert sum(tiers) == pytest.approx(1)
    assert metrics[0]["eval/held_out/num_samples"] == metrics[3]["eval/held_out/num_samples"] == 16


def test_samples_show_verdicts_tier_and_version(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    rows = list(read_samples(run_dir))
    assert {row["step"] for row in rows} == {1, 2, 3}
    for row in rows:
        correct = sum(rollout["is_correct"] for rollout in row["rollouts"])
        assert row["tier"] == {0: "hard", 4: "easy"}.get(correct, "mid")
        assert (row["teacher"] in ("short", "long")) == (row["tier"] == "hard")
        assert row["policy_version"] == row["step"] - 1


def test_exported_model_is_the_trained_one_and_loads_in_transformers(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    load = import_transformers().AutoModelForCausalLM.from_pretrained
    trained, initial = load(run_dir / "hf"), load(run_dir.parent / "model")
    moved = [(a - b).detach().abs().max() for a, b in zip(trained.parameters(), initial.parameters(), strict=True)]
    # Adam's first steps move every weight by about the learning rate, three times
    assert all(1e-5 < float(distance) < 4e-3 for distance in moved)
    assert torch.isfinite(trained(torch.tensor([[3, 4, 5]])).logits).all()


def test_report_is_one_page(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    subprocess.run([*COMMAND, "report", str(run_dir)], check=True, timeout=DEADLINE_S)
    page = (run_dir / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Make a run of two replicas, kill it and start it again.

    Return its folder, the output of the second start, and the step that the first start had saved."""
    folder = tmp_path_factory.mktemp("killed")
    sections: dict[str, Any] = {"parallel": {"num_processes": 2}, "optimizer": {"distributed": True}}
    config = write_task(folder, run={"steps": 100}, **sections)  # more than it makes before it is killed
    process = start("train", config)
    tracker = folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_until(process, lambda: tracker.is_file() and int(tracker.read_text()) >= 2)
    process.kill()
    process.communicate(timeout=DEADLINE_S)  # returns once ranks and servers have closed the pipe: none is left
    saved = int(tracker.read_text())
    return folder / "run", train(config, f"run.steps={saved + 2}"), saved


@pytest.mark.slow
def test_a_killed_run_continues_from_its_last_checkpoint_and_says_so(killed: tuple[Path, str, int]) -> None:
    run_dir, output, saved = killed
    assert f"resuming from {run_dir / 'checkpoints'}/step_{saved:06d}: {saved} of {saved + 2} steps are done" in output
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if record["step"] > 0] == [*range(1, saved + 3)]
    assert all(r["train/train_rollout_logprob_abs_diff"] <= MAX_GAP for r in records if r["step"] > saved)
    assert {row["step"] for row in read_samples(run_dir)} == {*range(1, saved + 3)}


@pytest.mark.slow
def test_two_replicas_share_prompts_and_work(killed: tuple[Path, str, int]) -> None:
    run_dir, _, _ = killed
    metrics = steps_of(run_dir)
    assert metrics[1]["rollout/num_prompts"] % 8 == 0
    shards = {path.name.split(".")[1] for path in (run_dir / "samples").iterdir()}
    assert shards == {"00000", "00001"}
    rows = list(read_samples(run_dir, [1]))
    assert len({row["prompt_id"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_context_parallel_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    # Adam's first step divides each gradient by its own size; eps suppresses rounding errors of gradients near zero.
    options: dict[str, Any] = {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3, "eps": 1e-5}}
    runs = []
    for name, axes in (("one", {}), ("four", {"tensor": 2, "context": 2, "sequence": True})):
        run_dir = tmp_path / name / "run"
        train(write_task(tmp_path / name, run={"dir": str(run_dir)}, parallel=axes, **options))
        weights = load_file(run_dir / "hf" / "model.safetensors")
        runs.append((steps_of(run_dir), weights))
    (expected, weights), (ours, our_weights) = runs
    for step in expected:
        for name in ("train/loss", "train/grad_norm", "train/sft_nll"):
            assert ours[step][name] == pytest.approx(expected[step][name], rel=1e-5), (step, name)
    assert our_weights.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(our_weights[name], tensor, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_a_run_that_solves_everything_at_once_exports_nothing_and_says_so(tmp_path: Path) -> None:
    config = write_task(
        tmp_path, grading={"verifier": "tests.support.e2e.parity_task:approve"}, batching={"max_collect_rounds": 2}
    )
    output = train(config, status=10)
    assert "no trainable prompt left among 48 draws: 48 Easy" in output
    run_dir = tmp_path / "run"
    assert not (run_dir / "hf").exists()
    written = json.loads((run_dir / "status.json").read_text())
    assert (written["cause"], written["status"], written["counts"]["dropped_easy"]) == ("nothing_left", 10, 48)
    (record,) = [one for one in read_metrics(run_dir / "metrics.jsonl") if one["step"] == 1]
    assert (record["gate/easy"], record["ledger/drawn"]) == (1.0, 48.0)
    assert len(list(read_samples(run_dir))) == 48


def test_dry_run_prints_the_resolved_config_and_starts_nothing(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    result = subprocess.run(
        [*COMMAND, "train", str(config), "objective.alpha=0.25", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["objective"]["alpha"] == 0.25
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.nmae=grpo", "did you mean objective.name?"),
        ("data.max_prompt_tokens=1", "48 of 48 prompts are longer than data.max_prompt_tokens=1"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(tmp_path: Path, override: str, message: str) -> None:
    config = write_task(tmp_path)
    result = subprocess.run(
        [*COMMAND, "train", str(config), override], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert result.returncode == 65
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
