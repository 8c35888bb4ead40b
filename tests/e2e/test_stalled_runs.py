"""A rank, or a whole run, that is stopped for a while: a rank is named once, in time, and the run goes on when it goes
on."""

from __future__ import annotations

import platform
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest

from megatron_dypo.ending import Cause
from tests.support.e2e.commands import finished, start, steps_of, wait_until
from tests.support.e2e.parity_task import write_task

pytestmark = pytest.mark.slow


def stalls(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if " W megatron_dypo: stall" in line]


def test_a_stopped_rank_is_named_once_within_three_steps_and_a_minute(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_task(
        tmp_path,
        run={"dir": str(run_dir), "steps": 100_000},
        objective={"name": "sft"},
        parallel={"num_processes": 2},
        checkpoint={"every": 0},
    )
    process, log = start("train", config), run_dir / "logs" / "rank_00000.log"
    wait_until(process, lambda: len(steps_of(run_dir)) >= 8)
    assert stalls(log) == [], "none in a run without a fault"
    usual_s = statistics.median(record["timing_s/step"] for step, record in steps_of(run_dir).items() if step)
    (rank,) = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    rank.suspend()
    stopped_at = time.monotonic()
    wait_until(process, lambda: bool(stalls(log)), deadline_s=3 * usual_s + 60)
    named_after_s = time.monotonic() - stopped_at
    rank.resume()
    done = max(steps_of(run_dir))
    wait_until(process, lambda: max(steps_of(run_dir)) >= done + 5 and len(stalls(log)) >= 2)
    process.send_signal(signal.SIGTERM)
    output = finished(process, Cause.STOPPED.status)
    first, second = stalls(log)
    assert f"stall: rank 1 on {platform.node()} (process {rank.pid}) has given no sign of life" in first
    assert "; it was " in first
    assert ".py:" in first, "its place in the code"
    assert f"stall over: rank 1 on {platform.node()} (process {rank.pid}) moves again" in second
    assert output.count("megatron-dypo: warning: stall: ") == 1
    print(f"named after {named_after_s:.1f} s; a step takes {usual_s:.2f} s")


def test_a_run_that_is_stopped_as_a_whole_for_longer_than_its_deadlines_goes_on_without_a_loss(tmp_path: Path) -> None:
    deadline_s, watchdog_s = 10.0, 20.0
    run_dir = tmp_path / "run"
    config = write_task(
        tmp_path,
        run={"dir": str(run_dir), "steps": 100_000, "watchdog_s": watchdog_s},
        rollout={"request_deadline_s": deadline_s},
        parallel={"num_processes": 2},
        checkpoint={"every": 0},
    )
    process = start("train", config)
    wait_until(process, lambda: len(steps_of(run_dir)) >= 3)
    before = max(steps_of(run_dir))
    parts = psutil.Process(process.pid).children(recursive=True)
    for server in parts:
        if any("sglang" in word for word in server.cmdline()):
            server.suspend()
    time.sleep(5.0)  # until the trainer waits for answers
    for part in [psutil.Process(process.pid), *parts]:
        part.suspend()
    time.sleep(1.5 * watchdog_s)
    for part in [*parts, psutil.Process(process.pid)]:
        part.resume()
    wait_until(process, lambda: max(steps_of(run_dir)) >= before + 5)
    process.send_signal(signal.SIGTERM)
    finished(process, Cause.STOPPED.status)
    records = [record for step, record in steps_of(run_dir).items() if step > before]
    assert sum(record["rollout/retries"] for record in records) >= 1, "requests were open"
    assert sum(record["rollout/incomplete_groups"] for record in records) == 0
