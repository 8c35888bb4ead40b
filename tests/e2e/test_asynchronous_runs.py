"""Runs that collect in the background: real ranks, a real SGLang."""

from __future__ import annotations

import json

import pytest

from megatron_dypo.metrics.samples import read_samples
from tests.support.e2e.commands import steps_of, train
from tests.support.e2e.parity_task import write_task

STEPS = 5
ASYNC = {"mode": "async", "prompts_per_round": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Make an asynchronous run of two replicas, stop it in the middle and resume it."""
    folder = tmp_path_factory.mktemp("async")
    config = write_task(
        folder,
        num_prompts=400,
        rollout=ASYNC,
        parallel={"num_processes": 2},
        objective={"importance": {"cap": 2.0}},
        eval={"sets": {"held_out": {"path": str(folder / "held_out.jsonl")}}, "every": 2},
    )
    first = train(config, "run.steps=3")
    state = json.loads((folder / "run" / "checkpoints" / "step_000002" / "trainer_state.json").read_text())
    return folder / "run", first + train(config, f"run.steps={STEPS}"), state


def test_a_batch_is_collected_while_the_one_before_is_learnt_from(finished):
    run_dir, _, _ = finished
    metrics = steps_of(run_dir)
    assert sorted(metrics) == list(range(STEPS + 1))
    # A step whose whole batch was waiting admits no group.
    versions = {step: metrics[step].get("rollout/policy_version") for step in range(1, STEPS + 1)}
    ages = {step: step - 1 - version for step, version in versions.items() if version is not None}
    assert ages[1] == 0
    assert all(0 <= age <= 1 for age in ages.values())
    assert max(ages.values()) > 0


def test_the_old_policy_is_the_one_that_the_update_starts_from(finished):
    run_dir, _, _ = finished
    metrics = steps_of(run_dir)
    assert all(abs(metrics[step]["train/ppo_kl"]) < 1e-6 for step in range(1, STEPS + 1))
    assert max(metrics[step]["train/train_rollout_logprob_abs_diff"] for step in range(1, STEPS + 1)) > 1e-5


def test_every_draw_is_sampled_once_over_a_resumption(finished):
    run_dir, output, _ = finished
    assert "resuming from" in output
    ids = [row["prompt_id"] for row in read_samples(run_dir)]
    assert len(ids) == len(set(ids))
    assert len(ids) >= STEPS * 8


def test_a_checkpoint_names_the_draws_in_flight(finished):
    _, _, state = finished
    trainer = state["trainer"]
    assert trainer["unfinished"] == sorted(set(trainer["unfinished"]))
    assert all(0 <= order < trainer["cursor"] for order in trainer["unfinished"])
    assert trainer["unfinished"], "with a batch under way some draws are"


def test_evaluation_goes_on_beside_the_rollouts(finished):
    run_dir, _, _ = finished
    metrics = steps_of(run_dir)
    assert all(metrics[step]["eval/held_out/num_samples"] == 16 for step in (0, 2, 3, 4, STEPS))


@pytest.mark.slow
def test_a_synchronous_run_that_oversamples_learns_from_the_weights_just_pushed(tmp_path):
    config = write_task(tmp_path, num_prompts=400, run={"steps": 2}, rollout={"oversample": 1.5})
    train(config)
    metrics = steps_of(tmp_path / "run")
    for step in (1, 2):
        assert metrics[step]["rollout/policy_version"] == step - 1
        assert metrics[step]["train/train_rollout_logprob_abs_diff"] <= 1e-3
