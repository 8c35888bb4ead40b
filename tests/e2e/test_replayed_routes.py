"""Runs that replay the experts of a real SGLang: a mixture of experts in bfloat16, whose routers disagree."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e.commands import steps_of, train
from tests.support.e2e.parity_task import write_task
from tests.support.hf_models import make_hf_model

EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 4}
"""SGLang pads experts of bfloat16 on a CPU to a multiple of 64."""
COUNT = {"qwen3_moe": "num_experts", "glm4_moe": "n_routed_experts"}
"""Kind of model → the field that says how many experts it has."""


def make_run(folder: Path, replay: str, kind: str = "qwen3_moe", **sections: Any) -> Path:
    config = write_task(
        folder,
        num_prompts=400,
        model={"dtype": "bfloat16"},
        objective={"replay": replay, **sections.pop("objective", {})},
        rollout={"max_new_tokens": 24, **sections.pop("rollout", {})},
        checkpoint={"every": 10},
        **sections,
    )
    shutil.rmtree(folder / "model")
    make_hf_model(kind, folder / "model", **{**EXPERTS, COUNT[kind]: 16})
    return config


@pytest.mark.slow
def test_the_servers_experts_bring_the_log_probs_nearer_over_twenty_updates(tmp_path: Path) -> None:
    config = make_run(tmp_path, "rollout", parallel={"pipeline": 2, "num_processes": 2})
    train(config, "run.steps=12")
    train(config, "run.steps=20")
    steps = [step for number, step in steps_of(tmp_path / "run").items() if number]
    assert len(steps) == 20
    with_replay, own = ([step[f"train/replay/logprob_gap{suffix}"] for step in steps] for suffix in ("", "_own_choice"))
    print(f"mean gap with replay {sum(with_replay) / 20:.2e}, without {sum(own) / 20:.2e} nats/token")
    assert sum(with_replay) < 0.9 * sum(own)
    # Groups that waited were sampled by earlier weights, whose routers chose otherwise more often.
    fresh = [step["train/replay/route_difference"] for step in steps if step["train/staleness"] == 0]
    assert fresh
    assert all(0 < difference < 0.05 for difference in fresh)
    assert all(step["train/train_rollout_logprob_abs_diff_max"] < 0.1 for step in steps)


@pytest.mark.slow
def test_a_biased_router_behind_a_dense_layer_takes_the_choice_of_servers_whose_router_is_fp32(tmp_path: Path) -> None:
    config = make_run(tmp_path, "rollout", "glm4_moe", parallel={"pipeline": 2, "num_processes": 2})
    train(config, "run.steps=4")
    steps = [step for number, step in steps_of(tmp_path / "run").items() if number]
    assert len(steps) == 4
    with_replay, own = ([step[f"train/replay/logprob_gap{suffix}"] for step in steps] for suffix in ("", "_own_choice"))
    assert sum(with_replay) < 0.9 * sum(own)
    assert all(step["train/train_rollout_logprob_abs_diff_max"] < 0.1 for step in steps)


def test_rollouts_that_a_refit_interrupts_bring_the_experts_of_all_of_their_tokens(tmp_path: Path) -> None:
    config = make_run(
        tmp_path,
        "rollout",
        objective={"importance": {"cap": 2.0}},
        optimizer={"lr": 1e-5},  # routers of all versions choose nearly the same
        rollout={"mode": "async", "max_new_tokens": 200, "prompts_per_round": 8},
        batching={"tokens_per_microbatch": 1024},
    )
    train(config, "run.steps=5", "grading.fail_truncated=false")
    steps = [step for number, step in steps_of(tmp_path / "run").items() if number]
    assert len(steps) == 5
    assert all(step["train/replay/route_difference"] < 0.1 for step in steps)
    assert sum(step.get("rollout/incomplete_groups", 0.0) for step in steps) == 0


@pytest.mark.slow
def test_updates_take_the_experts_of_the_pass_for_the_old_policy(tmp_path: Path) -> None:
    config = make_run(tmp_path, "trainer", batching={"epochs_per_batch": 2})
    train(config, "run.steps=4")
    steps = [step for number, step in steps_of(tmp_path / "run").items() if number]
    assert steps[0]["train/replay/route_difference"] == 0.0, "the first update begins with the weights of the pass"
    assert max(step["train/replay/route_difference"] for step in steps) > 0.0
