"""The cost of a probe in a plan: what it grows with, and what it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_dypo.planning.plan import as_data, make_plan
from megatron_dypo.planning.probe import ProbeCost, probe_cost
from megatron_dypo.planning.report import render
from megatron_dypo.planning.setting import Setting
from tests.support.planning_cases import architecture, pretraining


def setting_of(axes: dict[str, Any], gpus: int = 8, **probe: Any) -> Setting:
    setting = pretraining(architecture(), axes, gpus=gpus, batch=64)
    cfg = setting.config
    return dataclasses.replace(setting, config=dataclasses.replace(cfg, probe=dataclasses.replace(cfg.probe, **probe)))


def cost_of(axes: dict[str, Any], gpus: int = 8, **probe: Any) -> ProbeCost:
    return probe_cost(setting_of(axes, gpus, **probe))


def test_time_grows_with_the_trajectories_and_device_memory_does_not() -> None:
    few, many = cost_of({}, prompts=32), cost_of({}, prompts=128)
    assert many.trajectories == 4 * few.trajectories == 4 * 32 * (4 * 8 + 2)
    assert many.scores == pytest.approx(4 * few.scores)
    assert many.rollout > few.rollout
    assert many.device_bytes == few.device_bytes
    assert many.host_bytes == 4 * few.host_bytes == many.trajectories * 4096 * 4


def test_replicas_share_the_trajectories_and_stages_wait_for_each_other() -> None:
    assert cost_of({}, gpus=8).scores == pytest.approx(cost_of({}, gpus=4).scores / 2, rel=0.01)
    # Four stages of one replica work one after the other, four replicas at the same time.
    staged, replicated = cost_of({"pipeline": 4}, gpus=4), cost_of({}, gpus=4)
    assert 2 < staged.scores / replicated.scores < 6


def test_a_projection_costs_less_than_reducing_gradients_and_an_optimizer_step_do() -> None:
    cost = cost_of({"tensor": 4})
    assert 0 < cost.scores <= 1.3 * cost.update


def test_the_plan_shows_it_as_text_and_as_data() -> None:
    plan = make_plan(setting_of({}, prompts=16, every=25))
    assert "PROBE of 16 prompts × 4 × 8 rollouts and their traces, every 25 steps" in render(plan)
    assert as_data(plan)["probe"]["trajectories"] == 16 * (4 * 8 + 2)
