"""Metric names, sinks and timings."""

import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dypo.config.run import LoggingConfig
from megatron_dypo.metrics.declared import read_declared
from megatron_dypo.metrics.names import METRICS, Metric, lookup, name_part
from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.metrics.sinks import wandb_run_id
from megatron_dypo.metrics.writer import MetricsWriter, Timings, summary_line
from megatron_dypo.objective.metrics_page import all_metrics, markdown

JSONL_ONLY = LoggingConfig(tensorboard=False)


def _write(run_dir: Path, steps: range, cfg: LoggingConfig, *, offset: float = 0.0, resume_step: int = 0) -> None:
    with MetricsWriter(run_dir, cfg, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step + offset, "eval/held-out/accuracy": 0.5})


def _losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in read_metrics(run_dir / "metrics.jsonl")]


def _tensorboard_losses(run_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_metric_names_are_unique_and_have_a_meaning():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert len(all_metrics()) > len(METRICS)
    assert all(metric.meaning for metric in all_metrics())


def test_metrics_that_an_objective_declares_are_known_to_the_writer_and_to_a_later_report(tmp_path, caplog):
    declared = [Metric("shape/mean", "fraction", "mean weight", panel="Shape"), Metric("shape/max", "", "largest")]
    with (
        MetricsWriter(tmp_path, JSONL_ONLY, declared=declared) as writer,
        caplog.at_level("ERROR", logger="megatron_dypo"),
    ):
        writer.write(0, {"shape/mean": 0.5, "shape/max": 1.0})
    assert caplog.text == ""
    assert read_declared(tmp_path) == declared
    (tmp_path / "objective_metrics.json").write_text('[{"name": 1, "colour": 2}]')
    with pytest.raises(ValueError, match=r"objective_metrics\.json: not a list of metrics"):
        read_declared(tmp_path)


def test_a_pattern_matches_one_part_of_a_name():
    assert lookup("eval/gsm8k_test/accuracy").name == "eval/<set>/accuracy"
    assert lookup("teacher/qwen3-235b/share").name == "teacher/<name>/share"
    with pytest.raises(ValueError, match="eval/a/b/c/accuracy"):
        lookup("eval/a/b/c/accuracy")


def test_an_unknown_name_is_written_and_said_once(tmp_path, caplog):
    with pytest.raises(
        ValueError, match=r"'train/l' is neither in the table.*nor one of the objective; did you mean 'train/lr'"
    ):
        lookup("train/l")
    with MetricsWriter(tmp_path, JSONL_ONLY) as writer, caplog.at_level("ERROR", logger="megatron_dypo"):
        writer.write(0, {"train/los": 1.0})
        writer.write(1, {"train/los": 2.0})
    assert [record["train/los"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    assert caplog.text.count("'train/los'") == 1


def test_any_text_can_be_a_part_of_a_metric_s_name():
    names = ["Qwen/Qwen3-235B-A22B", "Qwen%2FQwen3-235B-A22B", "a b", "d\n"]
    metrics = [f"teacher/{name_part(name)}/share" for name in names]
    assert {lookup(metric).name for metric in metrics} == {"teacher/<name>/share"}
    assert len(set(metrics)) == len(names)


def test_the_page_of_metrics_is_the_table():
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == markdown(all_metrics()), (
        "run: python -m megatron_dypo.objective.metrics_page > docs/metrics.md"
    )


def test_each_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, JSONL_ONLY) as writer:
        for step in range(3):
            writer.write(step, {"train/loss": 1.0})
            assert len(_losses(tmp_path)) == step + 1


def test_a_resumed_run_has_one_line_a_step(tmp_path):
    _write(tmp_path, range(5), JSONL_ONLY)
    _write(tmp_path, range(3, 6), JSONL_ONLY, offset=100, resume_step=3)
    assert _losses(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 103), (4, 104), (5, 105)]


def test_a_line_that_a_killed_run_left_unfinished_goes_at_resume(tmp_path):
    _write(tmp_path, range(2), JSONL_ONLY)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    _write(tmp_path, range(2, 4), JSONL_ONLY, resume_step=2)
    assert [step for step, _ in _losses(tmp_path)] == [0, 1, 2, 3]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_a_step_is_written_once(tmp_path):
    with MetricsWriter(tmp_path, JSONL_ONLY) as writer:
        writer.write(4, {})
        with pytest.raises(ValueError, match=r"step=4.*last step written, 4"):
            writer.write(4, {})


def test_values_that_are_not_finite_leave_valid_json(tmp_path):
    with MetricsWriter(tmp_path, JSONL_ONLY) as writer:
        writer.write(0, {"train/grad_norm": math.inf, "train/loss": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["train/grad_norm"] is None
    assert record["train/loss"] is None


def test_tensorboard_reads_back_what_was_written(tmp_path):
    _write(tmp_path, range(4), LoggingConfig(), offset=0.25)
    assert _tensorboard_losses(tmp_path) == [(0, 0.25), (1, 1.25), (2, 2.25), (3, 3.25)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path):
    _write(tmp_path, range(4), LoggingConfig())
    _write(tmp_path, range(2, 5), LoggingConfig(), offset=100, resume_step=2)
    assert _tensorboard_losses(tmp_path) == [(0, 0), (1, 1), (2, 102), (3, 103), (4, 104)]


def test_tensorboard_is_off_when_the_config_says_so(tmp_path):
    _write(tmp_path, range(1), JSONL_ONLY)
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_wandb_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb=true.*pip install megatron-dypo\[wandb\]"):
        MetricsWriter(tmp_path, LoggingConfig(wandb=True))
    assert list(tmp_path.iterdir()) == []


class _FakeWandb(ModuleType):
    """A stand-in for a server that records its calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []
        self.lines: list[tuple[int, dict]] = []

    def init(self, **arguments):
        self.runs.append(arguments)
        return self

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def finish(self):
        self.runs[-1]["finished"] = True


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = LoggingConfig(tensorboard=False, wandb=True, wandb_project="p")
    _write(tmp_path, range(2), cfg)
    _write(tmp_path, range(2, 3), cfg, resume_step=2)
    first, second = fake.runs
    assert first["id"] == second["id"]
    assert (second["project"], second["resume"], second["finished"]) == ("p", "allow", True)
    assert [step for step, _ in fake.lines] == [0, 1, 2]


def test_wandb_ids_name_the_folder_and_differ_between_runs(tmp_path):
    ids = set()
    for parent in ("a", "b"):
        run_dir = tmp_path / parent / "my run"
        run_dir.mkdir(parents=True)
        ids.add(wandb_run_id(run_dir))
    assert len(ids) == 2
    assert all(run_id.startswith("my-run-") for run_id in ids)


def test_timings_add_up_to_the_step():
    timings = Timings()
    with timings.measure("step"):
        for _ in range(2):
            with timings.measure("gen"):
                sum(range(1000))
        with timings.measure("reward"):
            pass
    metrics = timings.take()
    parts = ("timing_s/gen", "timing_s/reward", "timing_s/other")
    assert sum(metrics[name] for name in parts) == pytest.approx(metrics["timing_s/step"])
    assert metrics["perf/overhead_ratio"] == pytest.approx(metrics["timing_s/other"] / metrics["timing_s/step"])
    assert timings.take() == {}


def test_a_clock_that_is_set_is_seen_in_the_update_in_which_it_was_set(monkeypatch):
    timings = Timings()
    real, steps = time.time, []
    for ahead_s in (0.0, 3600.0, 3600.0, -60.0):
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
        with timings.measure("step"):
            pass
        steps.append(timings.take()["perf/clock_step_s"])
        timings.take()  # what was measured after the update
    assert steps == pytest.approx([0.0, 3600.0, 0.0, -3660.0], abs=0.05)


def test_timings_keep_the_time_of_a_part_that_raises():
    timings = Timings()
    with pytest.raises(KeyError), timings.measure("gen"):
        raise KeyError
    with timings.measure("reward"):
        pass
    assert set(timings.take()) == {"timing_s/gen", "timing_s/reward"}


def test_timings_refuse_unknown_and_overlapping_parts():
    timings = Timings()
    with pytest.raises(ValueError, match="timing_s/sleep"), timings.measure("sleep"):
        pass
    with pytest.raises(ValueError, match="'reward' lies within that of 'gen'"), timings.measure("gen"):  # noqa: SIM117
        with timings.measure("reward"):
            pass


def test_the_summary_line_holds_what_is_known():
    metrics = {
        "rollout/reward": 0.4321,
        "gate/easy": 0.125,
        "gate/mid": 0.5,
        "gate/hard": 0.375,
        "train/loss": 0.25,
        "gal/loss": 0.69,
        "train/grad_norm": 1.5,
        "train/entropy": 0.75,
        "perf/tokens_per_sec": 2310.4,
        "timing_s/refit": 0.21,
    }
    assert summary_line(7, metrics) == (
        "step    7 | reward 0.432 | easy/mid/hard 12%/50%/38% | loss 0.25 (gal 0.69) | grad norm 1.5"
        " | entropy 0.750 | 2,310 tokens/s | refit 0.21 s"
    )
    assert summary_line(8, {}) == "step    8"


@pytest.mark.parametrize("resume_step", [0, 3])
def test_a_run_without_earlier_records_writes_no_step_before_its_first(tmp_path, resume_step):
    with MetricsWriter(tmp_path, JSONL_ONLY, resume_step=resume_step) as writer:
        with pytest.raises(ValueError, match=f"step={resume_step - 1}: must come after the last step written"):
            writer.write(resume_step - 1, {"train/loss": 1.0})
        writer.write(resume_step, {"train/loss": 1.0})


def test_a_run_that_resumes_writes_after_the_last_record_that_it_keeps(tmp_path):
    _write(tmp_path, range(5), JSONL_ONLY)
    with MetricsWriter(tmp_path, JSONL_ONLY, resume_step=4) as writer:
        with pytest.raises(ValueError, match="step=3: must come after the last step written, 3"):
            writer.write(3, {"train/loss": 1.0})
        writer.write(4, {"train/loss": 1.0})
