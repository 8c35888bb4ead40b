"""`megatron-dypo train` as a user runs it: real ranks, real SGLang, real checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_dypo.metrics.samples import read_samples
from megatron_dypo.metrics.sinks import read_metrics
from tests.support.e2e.parity_task import write_task
from tests.support.hf_models import import_transformers

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "megatron_dypo.cli"]
MAX_GAP = 1e-3
"""Largest mean |log-prob of SGLang − of the trainer| after a refit, fp32."""


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def train(config, *overrides, deadline_s=300, status=0):
    """Output of a run that must end with this status."""
    process = start("train", config, *overrides)
    output, _ = process.communicate(timeout=deadline_s)
    assert process.returncode == status, output
    return output


def steps_of(run_dir):
    return {record["step"]: record for record in read_metrics(run_dir / "metrics.jsonl")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A DYPO run at TP2×PP2 with evaluation, and its output."""
    folder = tmp_path_factory.mktemp("dypo")
    config = write_task(
        folder,
        run={"steps": 3},
        parallel={"tensor": 2, "pipeline": 2},
        objective={"kl_coef": 0.01},
        eval={"prompts": [str(folder / "held_out.jsonl")]},
    )
    return folder / "run", train(config)


def test_run_folder_holds_everything(finished):
    run_dir, output = finished
    assert sorted(path.name for path in (run_dir / "hf").glob("model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "logs/rank_00003.log", "logs/sglang_0.log"):
        assert (run_dir / name).exists(), name
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["objective"]["alpha"] == 0.5
    assert output.count("| reward") == 3


def test_each_rollout_batch_comes_from_the_weights_just_pushed(finished):
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


def test_samples_show_verdicts_tier_and_version(finished):
    run_dir, _ = finished
    rows = list(read_samples(run_dir))
    assert {row["step"] for row in rows} == {1, 2, 3}
    for row in rows:
        correct = sum(rollout["is_correct"] for rollout in row["rollouts"])
        assert row["tier"] == {0: "hard", 4: "easy"}.get(correct, "mid")
        assert (row["teacher"] in ("short", "long")) == (row["tier"] == "hard")
        assert row["policy_version"] == row["step"] - 1


def test_exported_model_is_the_trained_one_and_loads_in_transformers(finished):
    run_dir, _ = finished
    load = import_transformers().AutoModelForCausalLM.from_pretrained
    trained, initial = load(run_dir / "hf"), load(run_dir.parent / "model")
    moved = [(a - b).detach().abs().max() for a, b in zip(trained.parameters(), initial.parameters(), strict=True)]
    # Adam's first steps move every weight by about the learning rate, three times
    assert all(1e-5 < float(distance) < 4e-3 for distance in moved)
    assert torch.isfinite(trained(torch.tensor([[3, 4, 5]])).logits).all()


def test_report_is_one_page(finished):
    run_dir, _ = finished
    subprocess.run([*COMMAND, "report", str(run_dir)], check=True, timeout=120)
    page = (run_dir / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page


def test_a_finished_run_started_again_has_nothing_to_do(finished):
    run_dir, _ = finished
    before = (run_dir / "metrics.jsonl").read_text()
    output = train(run_dir.parent / "config.yaml")
    assert "resuming from" in output
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_a_killed_run_continues_from_its_last_checkpoint_and_says_so(tmp_path):
    config = write_task(tmp_path, run={"steps": 4}, parallel={"pipeline": 2})
    run_dir = tmp_path / "run"
    process = start("train", config)
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 240
    while not (tracker.is_file() and int(tracker.read_text()) >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=240)  # until ranks and servers have closed their ends of the pipe: none outlives it
    saved = int(tracker.read_text())

    output = train(config)
    assert f"resuming from {run_dir / 'checkpoints'}/step_{saved:06d}: {saved} of 4 steps are done" in output
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if record["step"] > 0] == [1, 2, 3, 4]
    assert all(r["train/train_rollout_logprob_abs_diff"] <= MAX_GAP for r in records if r["step"] > saved)
    assert {row["step"] for row in read_samples(run_dir)} == {1, 2, 3, 4}


def test_resumed_supervised_training_equals_an_undisturbed_run_bit_for_bit(tmp_path):
    options = {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2}}
    whole, parts = (
        write_task(tmp_path / name, run={"dir": str(tmp_path / name / "run"), "steps": 4}, **options)
        for name in ("whole", "parts")
    )
    train(whole, "checkpoint.every=0")
    # The schedule is that of the whole run, so the first part is stopped, not shortened.
    process = start("train", parts)
    tracker = parts.parent / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 120
    while not tracker.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resuming from" in train(parts)
    expected, resumed = (steps_of(folder.parent / "run") for folder in (whole, parts))
    for step in expected:
        for name in ("train/loss", "train/grad_norm", "train/lr", "train/sft_nll"):
            assert expected[step][name] == resumed[step][name], (step, name)


def test_context_parallel_ranks_train_as_one_process_does(tmp_path):
    # Adam's first step divides each gradient by its own size; eps keeps rounding out of those that are almost zero.
    options = {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3, "eps": 1e-5}}
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


def test_two_replicas_share_prompts_and_work(tmp_path):
    config = write_task(
        tmp_path, parallel={"num_processes": 2}, rollout={"servers": {"per_node": 2}}, checkpoint={"every": 0}
    )
    train(
        config,
        "optimizer.distributed=true",
        "rollout.max_new_tokens=8",
        "rollout.prompts_per_round=8",
        "rollout.group_size=4",
    )
    run_dir = tmp_path / "run"
    metrics = steps_of(run_dir)
    assert metrics[1]["rollout/num_prompts"] % 8 == 0
    assert metrics[2]["train/train_rollout_logprob_abs_diff"] <= MAX_GAP
    shards = {path.name.split(".")[1] for path in (run_dir / "samples").iterdir()}
    assert shards == {"00000", "00001"}
    rows = list(read_samples(run_dir, [1]))
    assert len({row["prompt_id"] for row in rows}) == len(rows)


def test_a_run_that_solves_everything_at_once_exports_nothing_and_says_so(tmp_path):
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


def test_dry_run_prints_the_resolved_config_and_starts_nothing(tmp_path):
    config = write_task(tmp_path)
    result = subprocess.run(
        [*COMMAND, "train", str(config), "objective.alpha=0.25", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["objective"]["alpha"] == 0.25
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor=3 does not divide num_attention_heads=8"),
        ("data.prompts=[absent.jsonl]", "data.prompts='absent.jsonl': no such file"),
        ("objective.nmae=grpo", "did you mean objective.name?"),
        ("objective.name=dpo", "objective.name='dpo': must be one of"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(tmp_path, override, message):
    config = write_task(tmp_path)
    result = subprocess.run([*COMMAND, "train", str(config), override], capture_output=True, text=True, timeout=60)
    assert result.returncode == 65
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
