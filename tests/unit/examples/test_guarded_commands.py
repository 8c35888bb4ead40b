"""A command of an example ends with the example."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_dypo.ending import Cause

EXAMPLES = Path(__file__).parents[3] / "examples"
DEADLINE_S = 120.0
WAITS = "import os, threading; print(os.getpid(), flush=True); threading.Event().wait()"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, Cause.STOPPED.status),
        (signal.SIGINT, Cause.STOPPED.status),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_command_of_a_stage_ends_with_the_program_that_runs_it(number: signal.Signals, status: int) -> None:
    program = (
        f"import sys; sys.path.append({str(EXAMPLES)!r}); from whole_job.stages import script; script('-c', {WAITS!r})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told, pid = process.stdout.readline(), process.stdout.readline()
        assert told.startswith("$ python -c")
        command = psutil.Process(int(pid))
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == status
        command.wait(DEADLINE_S)


def test_a_command_that_fails_ends_the_program() -> None:
    program = (
        f"import sys; sys.path.append({str(EXAMPLES)!r}); from whole_job.stages import script; script('-c', '1/0')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("python -c ended with status 1; run the same command again to go on\n")
