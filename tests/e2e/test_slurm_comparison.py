"""A comparison as a job array on a real Slurm: submitting again finishes cells that were cancelled or killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from megatron_dypo.launch.run_lock import read_holder
from tests.slurm_host.host import REPOSITORY, start_slurm
from tests.support.present import present
from tests.support.study.comparisons import journal_lines, run_here, tell, wait_until, write_comparison

DEADLINE_S = 900.0


@pytest.fixture(scope="module")
def slurm():
    host = start_slurm(nodes=2)
    yield host
    host.stop()


def submit(slurm, path):
    """Submit the missing cells; return the job's number and the command that was run."""
    settings = {"VENV": sys.prefix, "DYPO_HOME": str(REPOSITORY), "SBATCH_GPUS_PER_NODE": "2"}
    environment = {**os.environ, **settings, "SLURM_CONF": str(slurm.root / "slurm" / "slurm.conf")}

    def compare(*options):
        words = [sys.executable, "-m", "megatron_dypo.cli", "compare", str(path), "--slurm", *options]
        done = subprocess.run(
            words, cwd=slurm.root, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = compare("--dry-run")
    (number,) = re.findall(r"Submitted batch job (\d+)", compare())
    return number, command


def wait_until_gone(slurm):
    deadline = time.monotonic() + DEADLINE_S
    while slurm.call("squeue", "--noheader", "--name=compare"):
        assert time.monotonic() < deadline, slurm.call("squeue")
        time.sleep(0.2)


def kill_task(cell):
    """Send SIGKILL to the batch script of the task that runs a cell, and to its comparison."""
    comparison = psutil.Process(present(read_holder(cell)).process.pid)
    for process in (present(comparison.parent()), comparison):
        process.kill()


@pytest.mark.slow
def test_an_array_of_which_a_cell_was_cancelled_and_one_killed_ends_with_the_table_of_a_local_run_when_submitted_again(
    slurm, tmp_path
):
    for folder in ("local", "array"):
        (tmp_path / folder).mkdir()
    _, local = run_here(write_comparison(tmp_path / "local"))
    folder = tmp_path / "array"
    path = write_comparison(folder)
    held = ("dypo/seed-1", "grpo/seed-1")
    holds = [tell(folder, "hold", cell) for cell in held]
    number, command = submit(slurm, path)
    assert "--array=0,1,2,3 " in command
    begins = {f"begin train {cell}" for cell in held}
    wait_until(lambda: begins <= set(journal_lines(folder)), "two cells are trained", DEADLINE_S)
    slurm.call("scancel", f"{number}_0")
    kill_task(folder / "out" / "cells" / held[1])
    wait_until_gone(slurm)
    for hold in holds:
        hold.unlink()
    _, again = submit(slurm, path)
    assert "--array=0,1 " in again
    wait_until_gone(slurm)
    outputs = "\n".join(file.read_text() for file in slurm.root.glob("compare-*.out"))
    left, table = run_here(path)
    assert (left, table) == ([], local), outputs
    ended = [line for line in journal_lines(folder) if line.startswith("end eval")]
    assert sorted(ended) == sorted({f"end eval {method}/seed-{seed}" for method in ("dypo", "grpo") for seed in (1, 2)})
