"""A soak of a Slurm job: its processes, and how it is requeued and stopped. Slurm's commands are stand-ins."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dypo.ending import Cause
from tools.soak_parts.jobs import SlurmJob

WAITS = "import threading; threading.Event().wait()"
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0")" in
  scancel) [ -z "$NO_JOB" ] || exit 1; case "$*" in *USR1*) : >"$CALLS.requeued" ;; esac ;;
  squeue) if [ -e "$CALLS.requeued" ]; then echo "12 PENDING"; else echo "12 RUNNING"; fi ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins for Slurm's commands on the path; return the file in which each call is a line."""
    for name in ("scancel", "squeue", "scontrol"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


@pytest.fixture
def command() -> Iterator[psutil.Popen]:
    with psutil.Popen([sys.executable, "-c", WAITS]) as process:
        yield process
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def job(tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path / "dypo.yaml", ["run.steps=9"], tmp_path / "under", "--nodes=2 --comment='two words'")


def test_the_command_submits_the_script_with_the_options_and_waits(tmp_path: Path) -> None:
    command = job(tmp_path).command
    assert command[:3] == ["sbatch", "--wait", "--job-name=soak-under"]
    assert command[-4:-2] == ["--nodes=2", "--comment=two words"]
    assert Path(command[-2]).is_file()
    assert command[-1] == "run.steps=9"


def test_the_processes_of_the_job_are_found_by_its_name_and_told_apart(tmp_path: Path, command: psutil.Popen) -> None:
    lines = {
        "rank": ("megatron_dypo.cli", {"RANK": "0"}),
        "server": ("sglang_cpu.py", {}),
        "wrapper": ("srun megatron_dypo.launch.torchrun", {}),
    }
    mine = {"SLURM_JOB_NAME": "soak-under"}
    started = {
        role: subprocess.Popen([sys.executable, "-c", WAITS, line], env={**os.environ, **mine, **extra})
        for role, (line, extra) in lines.items()
    }
    stranger = subprocess.Popen(
        [sys.executable, "-c", WAITS, "sglang_cpu.py"], env={**os.environ, "SLURM_JOB_NAME": "x"}
    )
    try:
        found = job(tmp_path).find(command)
    finally:
        for process in (*started.values(), stranger):
            process.kill()
            process.wait()
    pids = {role: process.pid for role, process in started.items()}
    assert [one.pid for one in found.ranks] == [pids["rank"]]
    assert [one.pid for one in found.servers] == [pids["server"]]
    assert found.launcher is None, "a wrapper only names it"
    assert {one.pid for one in found.all} == {command.pid, *pids.values()}


def test_a_request_to_stop_requeues_the_job_and_starts_it_at_once(
    tmp_path: Path, calls: Path, command: psutil.Popen
) -> None:
    soaked = job(tmp_path)
    words = soaked.faults["ask to stop"].do(soaked.find(command), random.Random(1), threading.Event())
    assert words == "SIGUSR1 to job 12, which was requeued"
    lines = calls.read_text().splitlines()
    assert lines[0] == "scancel --batch --signal=USR1 --name=soak-under"
    assert lines[-1] == "scontrol update JobId=12 StartTime=now+3seconds"


def test_without_a_job_that_runs_there_is_no_such_fault(
    tmp_path: Path, calls: Path, command: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_JOB", "1")
    soaked = job(tmp_path)
    assert soaked.faults["ask to stop"].do(soaked.find(command), random.Random(1), threading.Event()) is None


def test_a_job_that_saved_and_was_requeued_is_cancelled_in_the_queue_and_counts_as_stopped(
    tmp_path: Path, calls: Path, command: psutil.Popen
) -> None:
    command.kill()  # as sbatch ends once its job is cancelled
    assert job(tmp_path).stop(command) == Cause.STOPPED.status
    assert calls.read_text().splitlines()[-1] == "scancel --name=soak-under"


def test_a_job_that_did_not_end_in_the_queue_has_the_status_of_its_command(
    tmp_path: Path, calls: Path, command: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_JOB", "1")
    command.kill()
    assert job(tmp_path).stop(command) == -9


def test_every_fault_leaves_the_job_to_start_itself_again(tmp_path: Path) -> None:
    assert {fault.outcome for fault in job(tmp_path).faults.values()} == {"goes on"}
