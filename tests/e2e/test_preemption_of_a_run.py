"""A run that gets SIGUSR1, as Slurm sends it: to every process, at any time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_dypo.metrics.sinks import read_metrics
from megatron_dypo.processes.stop_requests import PREEMPTED_STATUS
from tests.support.e2e.parity_task import write_task

REPOSITORY = Path(__file__).parents[2]


def start(config, *overrides):
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_dypo.cli", "train", str(config), *overrides],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return {record["step"]: record for record in read_metrics(path)} if path.is_file() else {}


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_nothing_had_been(tmp_path):
    options = {"objective": {"name": "sft"}, "parallel": {"num_processes": 2}, "checkpoint": {"every": 0}}
    whole, parts = (
        write_task(tmp_path / name, run={"dir": str(tmp_path / name / "run"), "steps": 30}, **options)
        for name in ("whole", "parts")
    )
    output, _ = (process := start(whole)).communicate(timeout=200)
    assert process.returncode == 0, output

    process, run_dir = start(parts), tmp_path / "parts" / "run"
    deadline = time.monotonic() + 120
    while 2 not in steps_of(run_dir):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for member in psutil.Process(process.pid).children(recursive=True):  # as Slurm does
        member.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED_STATUS, output
    done = max(steps_of(run_dir))
    assert done < 30
    assert f"{done} of 30 steps are done" in output.split("stopped on request")[-1]

    output, _ = (process := start(parts)).communicate(timeout=200)
    assert process.returncode == 0, output
    assert f"{done} of 30 steps are done" in output
    expected, resumed = steps_of(tmp_path / "whole" / "run"), steps_of(run_dir)
    assert expected.keys() == resumed.keys()
    for step in expected:
        for name in ("train/loss", "train/grad_norm", "train/lr", "train/sft_nll"):
            assert expected[step][name] == resumed[step][name], (step, name)
