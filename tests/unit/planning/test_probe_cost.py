"""The cost of a probe in a plan: what it grows with, and what it does not."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.plan import as_data, make_plan
from megatron_dypo.planning.probe import ProbeCost, probe_cost
from megatron_dypo.planning.report import render
from megatron_dypo.planning.setting import Setting, make_setting
from megatron_dypo.planning.step import reads_reference
from megatron_dypo.planning.training import logprob_time, swap_time
from tests.support.planning_cases import ROOT, architecture, from_file, pretraining


def setting_of(axes: dict[str, Any], gpus: int = 8, **probe: Any) -> Setting:
    setting = pretraining(architecture(), axes, gpus=gpus, batch=64)
    cfg = setting.config
    return dataclasses.replace(setting, config=dataclasses.replace(cfg, probe=dataclasses.replace(cfg.probe, **probe)))


def cost_of(axes: dict[str, Any], gpus: int = 8, **probe: Any) -> ProbeCost:
    return probe_cost(setting_of(axes, gpus, **probe))


def test_time_grows_with_the_trajectories_and_device_memory_does_not() -> None:
    few, many = cost_of({}, prompts=32), cost_of({}, prompts=128)
    assert many.trajectories == 4 * few.trajectories == 4 * 32 * (4 * 8 + 2)
    assert many.scores == pytest.approx(4 * few.scores, rel=0.02)  # the reference is swapped in once
    assert many.rollout > few.rollout
    assert many.device_bytes == few.device_bytes
    assert many.host_bytes == pytest.approx(4 * few.host_bytes)
    assert many.host_bytes >= many.trajectories * 4096 * 4


def test_scores_of_several_replicas_are_there_twice_while_they_are_joined() -> None:
    alone, joined = cost_of({}, gpus=1), cost_of({}, gpus=2)
    scores = alone.trajectories * 4096 * 4
    assert scores < alone.host_bytes < 1.5 * scores
    assert 2 * scores < joined.host_bytes < 2.5 * scores


def without_reference(setting: Setting) -> Setting:
    objective = dataclasses.replace(setting.config.objective, name="grpo", kl_coef=0.0)
    return dataclasses.replace(setting, config=dataclasses.replace(setting.config, objective=objective))


def test_log_probs_of_the_reference_count_if_there_is_one() -> None:
    setting = setting_of({})
    reference = logprob_time(setting, probe_cost(setting).trajectories).total + swap_time(setting)
    more = probe_cost(setting).scores - probe_cost(without_reference(setting)).scores
    assert more == pytest.approx(reference)


def test_replicas_share_the_trajectories_and_stages_wait_for_each_other() -> None:
    assert cost_of({}, gpus=8).scores == pytest.approx(cost_of({}, gpus=4).scores / 2, rel=0.01)
    # Four stages of one replica work one after the other, four replicas at the same time.
    staged, replicated = cost_of({"pipeline": 4}, gpus=4), cost_of({}, gpus=4)
    assert 2 < staged.scores / replicated.scores < 6


def test_a_projection_costs_less_than_reducing_gradients_and_an_optimizer_step_do() -> None:
    cost = probe_cost(without_reference(setting_of({"tensor": 4})))
    assert 0 < cost.scores <= cost.update


def paper_7b() -> Setting:
    folder, example = "tests/planning_configs/qwen2_5_math_7b", ROOT / "examples" / "qwen2_5_math_7b" / "dypo.yaml"
    config = load_config(example, [f"model.hf_path={ROOT / folder}", "rollout.servers.urls=[]"])
    return make_setting(config, find_gpu("a800-80gb"))


@pytest.mark.parametrize(
    "make",
    [paper_7b, partial(from_file, "llama3_70b"), partial(from_file, "qwen3_235b_a22b")],
    ids=["7B", "70B", "235B"],
)
def test_a_probe_is_planned_to_take_at_most_1_3_times_the_updates_with_the_log_probs_of_its_reference(make) -> None:
    setting = make()
    assert reads_reference(setting)
    cost = probe_cost(setting)
    assert 0 < cost.scores <= 1.3 * cost.update


def test_the_plan_shows_it_as_text_and_as_data() -> None:
    plan = make_plan(setting_of({}, prompts=16, every=25))
    assert "PROBE of 16 prompts × 4 × 8 rollouts and their traces, every 25 steps" in render(plan)
    assert as_data(plan)["probe"]["trajectories"] == 16 * (4 * 8 + 2)
