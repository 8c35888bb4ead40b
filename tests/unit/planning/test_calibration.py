"""A run's own constants from its metrics."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.planning.calibration import calibrate, calibrated, read_measured
from megatron_dypo.planning.constants import FITTED
from megatron_dypo.planning.step import step_time
from tests.support.planning_cases import ROOT, from_file

CONFIG = "tests/planning_configs/llama3_70b.yaml"
TRUE = replace(FITTED, matmul=0.8, dense_layer_s=4e-3, scheduler_s=1.2e-2, hbm=0.6, refit=0.2, loop_s=9.0)


def write_run(path, setting, **more):
    """Write the metrics of a run whose step takes what the plan says; its first step is ten times as long."""
    time = step_time(setting)
    seconds = {
        "gen": time.rollout,
        "old_log_prob": time.logprobs / 2,
        "ref_log_prob": time.logprobs / 2,
        "update_actor": time.update.total,
        "refit": time.refit,
        "reward": time.loop / 3,
        "other": time.loop * 2 / 3,
        "step": time.total,
    }
    lines = []
    for step, factor in ((1, 10), (2, 1), (3, 1), (4, 1)):
        times = {f"timing_s/{name}": value * factor for name, value in seconds.items()}
        lines.append({"step": step, "time": step * 100.0} | times | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_part_of_the_run_is_planned_with_its_constants(tmp_path):
    setting = from_file("llama3_70b")
    path = write_run(tmp_path / "metrics.jsonl", replace(setting, constants=TRUE))
    found = calibrate(setting, read_measured(path))
    assert found.steps == 3, "the first step warms up"
    assert set(found.parts) == {"rollout", "log-probs", "update", "refit", "loop"}
    for part, (before, measured, after) in found.parts.items():
        assert abs(before / measured - 1) > 0.1, part
        assert after == pytest.approx(measured, rel=0.03), part
    assert found.found.loop_s == pytest.approx(TRUE.loop_s, rel=0.02)
    assert found.found.refit == pytest.approx(TRUE.refit, rel=0.02)
    assert found.found.matmul < FITTED.matmul
    assert found.found.scheduler_s > FITTED.scheduler_s
    assert found.found.expert_layer_s == FITTED.expert_layer_s, "the model has no experts"


def test_a_run_as_planned_changes_no_constant(tmp_path):
    setting = from_file("llama3_70b")
    found = calibrate(setting, read_measured(write_run(tmp_path / "metrics.jsonl", setting)))
    for name in found.changed:
        assert getattr(found.found, name) == pytest.approx(getattr(FITTED, name), rel=0.01), name


def test_lengths_and_tiers_are_the_runs_unless_they_are_given(tmp_path):
    setting = from_file("llama3_70b", response_tokens=1000)
    more = {"rollout/response_len/mean": 1511.2, "rollout/prompt_len/mean": 90, "gate/easy": 0.1, "gate/hard": 0.6}
    path = write_run(tmp_path / "metrics.jsonl", setting, **more)
    taken, kept = (calibrated(setting, path, keep_lengths=keep)[0].assumed for keep in (False, True))
    assert (taken.prompt_tokens, taken.response_tokens) == (90, 1511)
    assert (taken.easy, taken.hard) == pytest.approx((0.1, 0.6))
    assert kept == setting.assumed


def test_an_asynchronous_runs_rollouts_say_nothing(tmp_path):
    setting = from_file("llama3_70b", "rollout.mode=async", "old_logp.source=server")
    path = write_run(tmp_path / "metrics.jsonl", replace(setting, constants=TRUE))
    found = calibrate(setting, read_measured(path))
    assert "rollout" not in found.parts
    assert found.found.scheduler_s == FITTED.scheduler_s


def test_the_command_prints_the_constants_and_plans_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write_run(tmp_path / "metrics.jsonl", replace(from_file("llama3_70b"), constants=TRUE))
    done = CliRunner().invoke(app, ["plan", CONFIG, f"--calibrate={path}"])
    assert done.stdout.startswith("CALIBRATION by 3 steps of the run")
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["loop_s"])
    assert line.split() == ["loop_s", "3.82", "9"]
    told = json.loads(CliRunner().invoke(app, ["plan", CONFIG, f"--calibrate={path}", "--json"]).stdout)
    true = step_time(replace(from_file("llama3_70b"), constants=TRUE))
    assert told["step"]["total_s"] == pytest.approx(true.total, rel=0.03)
    assert told["calibration"]["constants"]["refit"] == pytest.approx(TRUE.refit, rel=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"calibrate=.*metrics.jsonl: no such file; give the metrics.jsonl of a run folder"),
        ('{"step": 1}\n', r"calibrate=.*metrics.jsonl: no step in it has timing_s/step"),
        ("nonsense\n", r"metrics.jsonl:1: not a JSON object"),
    ],
    ids=["no file", "no times", "damaged"],
)
def test_a_file_that_measures_nothing_is_refused(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_measured(path)
