"""Planned beside measured, in the report of a run."""

import dataclasses
import json

import pytest

from megatron_dypo.metrics.planned import PlannedPart, PlannedStep, compare_with_plan, read_planned, write_planned
from megatron_dypo.metrics.report.page import render_report
from megatron_dypo.planning.announcement import announce_plan
from megatron_dypo.planning.step import step_time
from tests.support.planning_cases import from_file

PLAN = PlannedStep(
    prompt_tokens=100,
    response_tokens=2048,
    parts={
        "rollout": PlannedPart(seconds=10.0, low=8.0, high=12.5),
        "log-probs": PlannedPart(seconds=4.0, low=3.5, high=4.6),
        "step": PlannedPart(seconds=20.0, low=17.0, high=23.0),
    },
)


def record(step, factor=1.0):
    times = {"gen": 11.0, "old_log_prob": 3.0, "ref_log_prob": 3.0, "step": 21.0}
    return {"step": step, "time": float(step)} | {f"timing_s/{name}": value * factor for name, value in times.items()}


def test_a_part_is_the_sum_of_its_metrics_without_the_first_step():
    rows = compare_with_plan(PLAN, [record(1, 100.0), record(2), record(3)])
    assert {row.part: row.measured for row in rows} == {"rollout": 11.0, "log-probs": 6.0, "step": 21.0}
    assert {row.part: row.is_within for row in rows} == {"rollout": True, "log-probs": False, "step": True}


def test_a_part_of_some_steps_counts_by_its_share():
    rows = compare_with_plan(PLAN, [record(1), record(2), record(3) | {"timing_s/gen": None}])
    assert next(row.measured for row in rows if row.part == "rollout") == 5.5


def test_the_page_shows_planned_beside_measured(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2)))
    assert "planned and measured" not in render_report(tmp_path).read_text(encoding="utf-8")
    write_planned(tmp_path, PLAN)
    page = render_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>rollout</td><td>10 s</td><td>8 s – 12.5 s</td><td>11 s</td><td>1.10</td>" in page
    assert "<td>6 s (outside)</td><td>1.50</td>" in page
    assert "responses of 2,048 tokens" in page


def test_a_run_on_a_known_gpu_writes_its_plan_and_another_does_not(tmp_path):
    setting = from_file("llama3_70b", f"run.dir={tmp_path}")
    announce_plan(setting.config, device="some CPU", trainer_gpus=64, gpus_per_node=8)
    assert read_planned(tmp_path) is None
    announce_plan(setting.config, device="NVIDIA H100 80GB HBM3", trainer_gpus=64, gpus_per_node=8)
    planned = read_planned(tmp_path)
    assert planned is not None
    assert planned.parts["step"].seconds == pytest.approx(step_time(setting).total)
    assert planned.parts["step"].low < planned.parts["step"].seconds < planned.parts["step"].high
    assert planned.response_tokens == setting.assumed.response_tokens


def test_what_cannot_be_planned_ends_no_run(tmp_path, caplog):
    setting = from_file("llama3_70b", f"run.dir={tmp_path}")
    config = dataclasses.replace(setting.config, model=dataclasses.replace(setting.config.model, hf_path="nowhere"))
    announce_plan(config, device="NVIDIA H100 80GB HBM3", trainer_gpus=64, gpus_per_node=8)
    assert read_planned(tmp_path) is None
    assert "no plan of this run" in caplog.text


def test_a_damaged_plan_is_refused_by_its_file(tmp_path):
    (tmp_path / "planned.json").write_text('{"parts": 3}')
    with pytest.raises(ValueError, match=r"planned.json: not a planned step: "):
        read_planned(tmp_path)
