"""A run that gets SIGUSR1 as Slurm sends it, to every process at any time; and a run that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dypo.processes.stop_requests import PREEMPTED_STATUS
from tests.support.e2e.commands import DEADLINE_S, finished, start, steps_of, train, wait_until
from tests.support.e2e.parity_task import write_task


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_then_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
        "parallel": {"num_processes": 2},
        "checkpoint": {"every": 0},
    }
    whole, parts = (
        write_task(tmp_path / name, run={"dir": str(tmp_path / name / "run"), "steps": 30}, **options)
        for name in ("whole", "parts")
    )
    train(whole)

    process, run_dir = start("train", parts), tmp_path / "parts" / "run"
    wait_until(process, lambda: 2 in steps_of(run_dir))
    for member in psutil.Process(process.pid).children(recursive=True):  # as Slurm does
        member.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    output = finished(process, PREEMPTED_STATUS)
    done = max(steps_of(run_dir))
    assert done < 30
    assert f"{done} of 30 steps are done" in output.split("stopped on request")[-1]

    process = start("train", parts, "checkpoint.every=1")
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_until(process, lambda: int(tracker.read_text()) >= done + 2)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert f"{done} of 30 steps are done" in output

    assert "resuming from" in train(parts)
    expected, resumed = steps_of(tmp_path / "whole" / "run"), steps_of(run_dir)
    assert expected.keys() == resumed.keys()
    for step in expected:
        for name in ("train/loss", "train/grad_norm", "train/lr", "train/sft_nll"):
            assert expected[step][name] == resumed[step][name], (step, name)
