"""The goodput of runs whose times are known."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.config.run import LoggingConfig
from megatron_dypo.ending import Cause
from megatron_dypo.metrics.attempts import NAME, read_attempts
from megatron_dypo.metrics.goodput import PARTS, Goodput, measure_goodput
from megatron_dypo.metrics.report.page import render_report
from megatron_dypo.metrics.status import RunStatus
from megatron_dypo.metrics.writer import MetricsWriter

Lines = Sequence[Mapping[str, Any]]


def goodput_of(folder: Path, events: Lines, records: Lines) -> Goodput:
    for name, lines in ((NAME, events), ("metrics.jsonl", records)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure_goodput(folder)
    assert found is not None
    return found


def step(number: int, time: float, seconds: float, **inside: float) -> dict[str, Any]:
    return {"step": number, "time": time, "timing_s/step": seconds, **{f"timing_s/{k}": v for k, v in inside.items()}}


def start(time: float) -> dict[str, Any]:
    return {"time": time, "event": "start", "attempt": str(time)}


def end(time: float, cause: str = "done") -> dict[str, Any]:
    return {"time": time, "event": "end", "attempt": "a", "cause": cause}


def redo(time: float, **fields: float) -> dict[str, Any]:
    return {"time": time, "event": "redo", **fields}


def test_a_run_in_one_go(tmp_path: Path) -> None:
    records = [{"step": 0, "time": 130.0}, step(1, 160.0, 20.0, eval=5.0), step(2, 190.0, 30.0, save_checkpoint=3.0)]
    found = goodput_of(tmp_path, [start(100.0), end(200.0)], records)
    expected = {"training": 42.0, "evaluation": 5.0, "saving": 3.0, "starting": 40.0, "ending": 10.0}
    assert {part: value for part, value in found.seconds.items() if value} == expected
    assert (found.wall_s, found.ratio, found.starts, found.causes) == (100.0, 0.42, 1, {"done": 1})


def test_a_killed_start_loses_the_steps_that_are_made_again_and_the_time_until_the_next_start(tmp_path: Path) -> None:
    events = [
        start(0.0),
        start(100.0),  # the first was killed after step 3, at 60; the checkpoint is of step 1
        redo(110.0, steps=2, seconds=20.0, first_time=40.0, last_time=60.0),
        end(160.0, "stopped"),
        start(200.0),
    ]
    records = [step(1, 40.0, 30.0), step(2, 140.0, 10.0), step(3, 150.0, 10.0), step(4, 220.0, 10.0)]
    found = goodput_of(tmp_path, events, records)
    assert {part: value for part, value in found.seconds.items() if value} == {
        "training": 60.0,
        "starting": 10.0 + 30.0 + 10.0,
        "steps made again": 20.0,
        "ending": 10.0,
        "between starts": 40.0 + 40.0,
    }
    assert found.wall_s == sum(found.seconds.values()) == 220.0
    assert (found.starts, found.redone_steps, found.causes) == (3, 2, {"killed": 1, "stopped": 1})


def test_a_start_without_a_step_is_all_starting(tmp_path: Path) -> None:
    found = goodput_of(tmp_path, [start(0.0), end(50.0, "servers_gone")], [])
    assert found.seconds["starting"] == found.wall_s == 50.0
    assert found.ratio == 0.0


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=8), st.lists(st.floats(0.0, 1e6), max_size=8))
def test_no_clock_makes_a_negative_part(begins: list[float], ends_of_steps: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = [step(number, time, 10.0) for number, time in enumerate(ends_of_steps, start=1)]
        found = goodput_of(Path(folder), [start(time) for time in begins], records)
    assert set(found.seconds) == set(PARTS)
    assert all(value >= 0.0 for value in found.seconds.values())


def test_starts_ends_and_repeated_steps_of_a_run_are_on_record(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, "first", rank=0)
    status.open()
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=False), resume_step=1) as writer:
        for number in (1, 2, 3):
            writer.write(number, {"timing_s/step": 0.0625 * number})
    again = RunStatus(tmp_path, "second", rank=0)  # the first was killed
    again.open()
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=False), resume_step=2) as writer:
        writer.write(2, {"timing_s/step": 0.0625})
    again.end(Cause.STOPPED, "asked")
    events = [(event["event"], event.get("steps"), event.get("cause")) for event in read_attempts(tmp_path)]
    assert events == [("start", None, None), ("start", None, None), ("redo", 2, None), ("end", None, "stopped")]
    assert read_attempts(tmp_path)[2]["seconds"] == 0.0625 * 5
    found = measure_goodput(tmp_path)
    assert found is not None
    assert (found.starts, found.redone_steps, found.causes) == (2, 2, {"killed": 1, "stopped": 1})
    page = render_report(tmp_path).read_text(encoding="utf-8")
    assert "Where the time went" in page
    assert "steps made again: 2" in page


def test_an_older_run_without_starts_on_record_has_no_goodput(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, 10.0, 5.0)) + "\n")
    assert measure_goodput(tmp_path) is None


@pytest.mark.parametrize("line", ["{", "[1"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / NAME).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=rf"{NAME}:1: not a JSON object"):
        measure_goodput(tmp_path)
