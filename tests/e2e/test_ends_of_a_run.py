"""Runs of two ranks that end in other ways than by their last step."""

import json
import os
import platform
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.mcore.checkpoints.folder import find_latest
from tests.support.e2e.commands import REPOSITORY, start, steps_of, wait_until
from tests.support.e2e.parity_task import write_task
from tests.support.present import present

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path):
    """Write the config of a supervised run of two ranks that is longer than any test."""
    run = {"dir": str(tmp_path / "run"), "steps": 100_000}
    return write_task(
        tmp_path, run=run, objective={"name": "sft"}, parallel={"num_processes": 2}, checkpoint={"every": 0}
    )


def begun(config: Path, *overrides: str, **environment: Any) -> subprocess.Popen[str]:
    """Start a run and wait until it has done three steps."""
    process = start("train", config, *overrides, **environment)
    wait_until(process, lambda: len(steps_of(config.parent / "run")) >= 3)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def status_of(config):
    return json.loads((config.parent / "run" / "status.json").read_text())


def rank_of(process, rank):
    (found,) = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == str(rank)]
    return found


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_the_launcher_alone_saves(task, number):
    process = begun(task)
    process.send_signal(number)
    code, output = finish(process)
    assert code == Cause.STOPPED.status, output
    assert "Traceback" not in output
    assert f"{number.name}: the run finishes its step, saves a checkpoint and ends" in output
    assert output.splitlines()[-1].startswith("megatron-dypo: stopped (status 75): ")
    assert find_latest(task.parent / "run" / "checkpoints") is not None
    assert status_of(task)["requeue"] is True


def test_ctrl_c_saves_under_a_long_temporary_folder(task, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    process = begun(task, TMPDIR=str(long))
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == Cause.STOPPED.status, output
    assert "Traceback" not in output
    assert find_latest(tmp_path / "run" / "checkpoints") is not None


def test_a_second_ctrl_c_ends_at_once(task):
    process = begun(task)
    os.killpg(process.pid, signal.SIGSTOP)  # then both signals come before a step ends
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    lines = iter(present(process.stdout).readline, "")
    assert any("SIGINT: the run finishes its step" in line for line in lines)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == Cause.INTERRUPTED.status, output
    assert "error: interrupted (status 130): ended at once by a second SIGINT" in output
    assert psutil.wait_procs(ranks, timeout=30)[1] == []


def test_a_rank_that_is_killed_is_named_and_the_next_start_goes_on(task):
    process = begun(task)
    refused, said = finish(start("train", task))
    assert (refused, len(said.splitlines())) == (Cause.IN_USE.status, 1), said
    killed = rank_of(process, 1)
    killed.kill()
    code, output = finish(process)
    assert code == Cause.RANK_LOST.status, output
    assert "megatron-dypo: error: rank_lost (status 77): rank 1 was killed by SIGKILL; " in output
    assert "Traceback" not in output
    assert status_of(task)["message"] == "rank 1 was killed by SIGKILL"
    code, output = finish(start("train", task, "run.steps=2"))
    assert code == 0, output


def test_a_rank_that_stands_still_is_named_with_what_it_was_doing(task):
    process = begun(task, "run.watchdog_s=20")
    stopped = rank_of(process, 1)
    stopped.suspend()
    code, output = finish(process)
    assert code == Cause.RANK_HUNG.status, output
    line = rf"error: rank_hung \(status 76\): rank 1 on \S+ \(process {stopped.pid}\) has given no sign of life "
    line += r"for 2\d s; "
    assert re.search(line, output)
    assert output.count(f"warning: stall: rank 1 on {platform.node()} (process {stopped.pid}) has given no") == 1
    stacks = (task.parent / "run" / "logs" / "rank_00001.log").read_text()
    assert "Fatal Python error: Aborted" in stacks
    assert "megatron_dypo/loop/train.py" in stacks


def test_a_disk_that_is_full_ends_the_run_and_leaves_the_older_checkpoint(task):
    checkpoints = task.parent / "run" / "checkpoints"
    process = begun(task, "checkpoint.every=3", "checkpoint.keep=0")
    wait_until(process, lambda: find_latest(checkpoints) is not None)
    for rank in psutil.Process(process.pid).children():
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    code, output = finish(process)
    assert code == Cause.DISK_FULL.status, output
    assert "error: disk_full (status 74): " in output
    assert "Traceback" not in output
    assert find_latest(checkpoints) is not None
    assert not list(checkpoints.glob("*.tmp"))


def test_an_error_of_one_rank_is_told_once_with_its_traceback(task):
    # Only rank 1 has this module, and it cannot be imported.
    (task.parent / "broken").mkdir()
    (task.parent / "broken" / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1':\n    sys.modules['megatron_dypo.loop.train'] = None\n"
    )
    process = start("train", task, PYTHONPATH=f"{task.parent / 'broken'}:{REPOSITORY}")
    code, output = finish(process)
    assert code == Cause.BUG.status, output
    assert output.count("Traceback (most recent call last)") == 1
    assert "ChildFailedError" not in output
    assert status_of(task)["rank"] == 1


def test_a_folder_that_cannot_be_used_is_one_line_on_two_ranks(task):
    (task.parent / "run").write_text("a file")
    code, output = finish(start("train", task))
    assert code == Cause.BAD_INPUT.status
    line = f"megatron-dypo: error: run.dir='{task.parent / 'run'}': a file is there"
    assert output.splitlines()[-1].startswith(line), output
    assert "Traceback" not in output
