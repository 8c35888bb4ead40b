"""Profiles of single steps: which parts they see, what communication is exposed, and the picture of full memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.config.profile import ProfileConfig
from megatron_dypo.loop import profiler
from megatron_dypo.loop.profiler import Profiler, exposed_communication, memory_picture
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.parallel import device


def profiled(tmp_path: Path, *, rank: int = 0, **options: Any) -> Timings:
    """Make three steps of three parts under a profiler; return their timings."""
    timings, step = Timings(), [0]
    cfg = ProfileConfig(**options)
    timings.around = Profiler(cfg=cfg, rank=rank, run_dir=tmp_path, step=lambda: step[0] + 1, note=timings.note).around
    for _ in range(3):
        with timings.measure("step"):
            with timings.measure("gen"):
                torch.ones(3).sum()
            with timings.measure("update_actor"), timings.inside("optimizer_step"):
                torch.ones(3, 3) @ torch.ones(3, 3)
        step[0] += 1
        with timings.measure("eval"):
            torch.ones(5).cumsum(0)
    return timings


def trace(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_trace_has_the_parts_of_its_step_and_no_other(tmp_path: Path) -> None:
    timings = profiled(tmp_path, steps=(2,))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step_2_rank_0.json.gz"]
    names = trace(tmp_path / "profile" / "step_2_rank_0.json.gz")
    for part in ("step 2", "gen", "update_actor", "optimizer_step"):
        assert names.count(part) == 1, part
    assert "aten::mm" in names
    assert "step 1" not in names
    assert "eval" not in names
    assert "aten::cumsum" not in names
    assert timings.take().keys() >= {"timing_s/step", "timing_s/gen", "timing_s/eval"}


@pytest.mark.parametrize("options", [{}, {"steps": (2,), "ranks": (1, 2)}, {"steps": (4,)}])
def test_other_steps_and_ranks_write_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    profiled(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_writing_a_trace_is_not_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    timings = Timings()
    timings.around = Profiler(
        cfg=ProfileConfig(steps=(1,)), rank=0, run_dir=tmp_path, step=lambda: 1, note=timings.note
    ).around
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: seen.append(dict(timings._seconds)))
    with timings.measure("step"):
        pass
    assert list(seen[0]) == ["step"], "the step's time was taken before the trace was written"


def test_nsight_gets_ranges_inside_of_the_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(device, "begin_capture", lambda: calls.append("begin"))
    monkeypatch.setattr(device, "end_capture", lambda: calls.append("end"))
    monkeypatch.setattr(device, "push_range", calls.append)
    monkeypatch.setattr(device, "pop_range", lambda: calls.append("pop"))
    profiled(tmp_path, steps=(2,), tool="nsys")
    parts = ["gen", "pop", "update_actor", "optimizer_step", "pop", "pop"]
    assert calls == ["begin", "step 2", *parts, "pop", "end"]
    assert list(tmp_path.iterdir()) == []


def test_the_exposed_share_of_the_first_ranks_gpu_is_a_metric_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [("ncclDevKernel_AllReduce", 0.0, 4.0), ("gemm", 3.0, 10.0)]
    monkeypatch.setattr(device, "gpu_spans", lambda profile: spans)
    assert profiled(tmp_path, steps=(2,)).take()["perf/exposed_communication_ratio"] == pytest.approx(0.3)
    other = profiled(tmp_path, rank=1, steps=(2,), ranks=(0, 1)).take()
    assert "perf/exposed_communication_ratio" not in other


def is_talk(name: str) -> bool:
    return name == "talk"


@pytest.mark.parametrize(
    ("spans", "communication", "exposed"),
    [
        ([("talk", 0, 10)], 1.0, 1.0),
        ([("work", 0, 10)], 0.0, 0.0),
        ([("talk", 0, 5), ("work", 0, 10)], 0.5, 0.0),
        ([("talk", 0, 5), ("work", 4, 10)], 0.5, 0.4),
        ([("talk", 2, 4), ("talk", 3, 6), ("work", 0, 1), ("work", 9, 10)], 0.4, 0.4),
    ],
)
def test_exposed_communication_is_that_which_nothing_runs_beside(
    spans: list[tuple[str, float, float]], communication: float, exposed: float
) -> None:
    found = exposed_communication(spans, is_talk)
    assert found is not None
    assert (found.communication, found.exposed) == pytest.approx((communication, exposed))


def test_without_a_gpu_there_is_no_share() -> None:
    assert exposed_communication([], is_talk) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["talk", "work"]), st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12
    )
)
def test_shares_are_those_of_counting_each_moment(spans: list[tuple[str, int, int]]) -> None:
    talk, work = np.zeros(64, bool), np.zeros(64, bool)
    for name, begin, length in spans:
        (talk if is_talk(name) else work)[begin : begin + length] = True
    either = np.flatnonzero(talk | work)
    total = either[-1] - either[0] + 1
    found = exposed_communication([(name, begin, begin + length) for name, begin, length in spans], is_talk)
    assert found is not None
    assert found.total_us == total
    assert found.communication == pytest.approx(talk.sum() / total)
    assert found.exposed == pytest.approx((talk & ~work).sum() / total)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for a GPU whose allocator records; return the calls."""
    calls: list[str] = []

    def dump(path: Path) -> None:
        path.write_bytes(b"snapshot")
        calls.append("dump")

    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(profiler, "record_memory", lambda: calls.append("record"))
    monkeypatch.setattr(profiler, "dump_memory", dump)
    return calls


def run_into(error: Exception, cfg: ProfileConfig, run_dir: Path) -> None:
    with pytest.raises(type(error)), memory_picture(cfg, 3, run_dir):
        raise error


def test_a_rank_that_runs_out_of_memory_leaves_a_picture_of_it(gpu: list[str], tmp_path: Path) -> None:
    run_into(torch.OutOfMemoryError("CUDA out of memory"), ProfileConfig(memory_snapshot=True), tmp_path)
    assert gpu == ["record", "dump"]
    assert (tmp_path / "profile" / "out_of_memory_rank_3.pickle").read_bytes() == b"snapshot"


@pytest.mark.parametrize(
    ("error", "cfg", "calls"),
    [
        (ValueError("no"), ProfileConfig(memory_snapshot=True), ["record"]),
        (torch.OutOfMemoryError("CUDA out of memory"), ProfileConfig(), []),
    ],
)
def test_other_errors_and_other_configs_leave_none(
    gpu: list[str], tmp_path: Path, error: Exception, cfg: ProfileConfig, calls: list[str]
) -> None:
    run_into(error, cfg, tmp_path)
    assert gpu == calls
    assert list(tmp_path.iterdir()) == []


def test_on_a_cpu_a_warning_says_that_there_is_nothing_to_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with memory_picture(ProfileConfig(memory_snapshot=True), 0, tmp_path):
        pass
    assert "profile.memory_snapshot=true: does nothing here: this machine has no GPU" in caplog.text


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": (0,)}, "steps=[0]: steps are counted from 1"),
        ({"steps": (1,), "ranks": ()}, "ranks=[]: name the ranks"),
        ({"ranks": (-1,)}, "ranks=[-1]: ranks are counted from 0"),
    ],
)
def test_impossible_profiles_are_refused(options: dict[str, Any], line: str) -> None:
    make: Callable[..., ProfileConfig] = ProfileConfig
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the test compares
        make(**options)
    assert str(caught.value).startswith(line)
