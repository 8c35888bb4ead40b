"""Commands of the GPU check: how they end is told at once, with the last line of their log."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools.gpu_parts.jobs import JobError, run, started, wait_for_line

PYTHON = [sys.executable, "-u", "-c"]


def test_a_failed_command_gives_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(JobError, match=re.escape(f"status 3: no luck; see {log}")):
        run([*PYTHON, "print('starts'); print('no luck'); raise SystemExit(3)"], log, 60.0)


def test_a_slow_command_is_ended_with_all_of_its_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid); sys.stdin.read(); "
    with pytest.raises(JobError, match="not done after 2 s"):
        run([*PYTHON, child + "import time; time.sleep(600)"], log, 2.0)
    number = int(log.read_text().split()[0])
    assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_ends_before_its_line_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("serving at the address of an attempt before\n")
    began = time.monotonic()
    command = [*PYTHON, "print('address already in use'); raise SystemExit(69)"]
    with (
        pytest.raises(JobError, match=re.escape("status 69: address already in use")),
        started(command, log) as process,
    ):
        wait_for_line(process, log, "serving at", 60.0)
    assert time.monotonic() - began < 30.0


def test_a_command_is_used_once_it_has_written_its_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started([*PYTHON, "import time; print('serving at'); time.sleep(600)"], log) as process:
        wait_for_line(process, log, "serving at", 60.0)
        assert process.poll() is None
    assert process.poll() is not None


def test_a_command_that_never_writes_its_line_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(JobError, match="no 'serving at' after 1 s"),
        started([*PYTHON, "import time; time.sleep(600)"], log) as process,
    ):
        wait_for_line(process, log, "serving at", 1.0)
