"""A task of a comparison's job array: slurm/compare.sh without Slurm; its python is a script that ends as told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.launch.run_lock import STALE_S

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "slurm" / "compare.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
status=$(sed -n "$(wc -l <"$CALLS")p" "$STATUSES")
if [ "$status" = hold ]; then
  /bin/sleep 200 >/dev/null 2>&1 &
  trap 'kill $!; exit 75' USR1
  touch "$HELD"
  wait
fi
exit "$status"
"""
DEADLINE_S = 120.0


def start(folder: Path, *statuses: int | str, state: str = "RUNNING") -> subprocess.Popen[str]:
    """Start task 2 of array 7, whose commands end with these statuses; ``hold``: once they get SIGUSR1."""
    programs = folder / "bin"
    programs.mkdir()
    stand_ins = {
        "python": PYTHON,
        "sleep": '#!/bin/sh\necho "sleep $*"\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*"\n',
        "squeue": f"#!/bin/sh\necho {state}\n",
    }
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    (folder / "comparison.yaml").touch()
    (folder / "calls").touch()
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    files = {"CALLS": str(folder / "calls"), "STATUSES": str(folder / "statuses"), "HELD": str(folder / "held")}
    home = {"DYPO_HOME": str(REPOSITORY), "VENV": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", SCRIPT, folder / "comparison.yaml"],
        env={**os.environ, **task, **files, **home},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("statuses", "ended", "said"),
    [
        ([0], 0, []),
        ([Cause.NO_VERDICTS.status], Cause.NO_VERDICTS.status, []),
        ([Cause.STOPPED.status], 0, ["scontrol requeue 7_2"]),
        ([Cause.IN_USE.status, 0], 0, ["sleep 210"]),
        ([Cause.IN_USE.status, Cause.STOPPED.status], 0, ["sleep 210", "scontrol requeue 7_2"]),
        ([Cause.IN_USE.status, Cause.IN_USE.status], Cause.IN_USE.status, ["sleep 210"]),
        ([137], 137, []),
    ],
)
def test_a_task_ends_as_its_cell_goes_back_to_the_queue_or_tries_a_cell_in_use_once_more(
    statuses: list[int], ended: int, said: list[str], tmp_path: Path
) -> None:
    process = start(tmp_path, *statuses)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == ended, output
    assert [line for line in output.splitlines() if not line.startswith("dypo: ")] == said
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"-m megatron_dypo.cli compare {tmp_path}/comparison.yaml --cell 2"] * len(statuses)


@pytest.mark.parametrize(
    ("number", "state", "ended"),
    [
        (signal.SIGUSR1, "RUNNING", 0),
        (signal.SIGTERM, "RUNNING", 0),
        (signal.SIGTERM, "COMPLETING", Cause.STOPPED.status),
    ],
    ids=["time limit", "preempted", "cancelled"],
)
def test_a_task_asks_its_cell_to_stop_and_goes_back_to_the_queue_unless_it_is_cancelled(
    number: signal.Signals, state: str, ended: int, tmp_path: Path
) -> None:
    process = start(tmp_path, "hold", state=state)
    deadline = time.monotonic() + DEADLINE_S
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == ended, output
    assert ("scontrol requeue 7_2" in output) == (ended == 0)


def test_a_task_waits_longer_than_a_lock_without_a_sign_of_life_lasts() -> None:
    (seconds,) = re.findall(r"sleep (\d+)", SCRIPT.read_text())
    assert float(seconds) > STALE_S + 10
