"""The guard: the process between a trainer and its server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_dypo.processes import children
from tests.support.fake_sglang import wait_until


def guarded(program: str, grace_s: float = 5.0) -> list[str]:
    guard = "megatron_dypo.processes.guard:main"
    return children.program(guard, os.getpid(), grace_s, sys.executable, "-c", program, isolated=True)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal was sent to a process and is not delivered yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) & 1 << number - 1)


def test_a_command_starts_with_no_signal_blocked() -> None:
    program = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    done = subprocess.run(guarded(program), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_the_guard_ends_with_the_status_of_its_command(end: str, status: int) -> None:
    done = subprocess.run(guarded(f"import os, sys; {end}"), timeout=60, check=False)
    assert done.returncode == status


def test_a_stop_signal_of_another_process_than_the_parent_stops_nothing() -> None:
    command = guarded("print('up', flush=True); input(); print('goes on')")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        stranger = f"import os; os.kill({process.pid}, {int(signal.SIGTERM)})"
        for _ in range(2):  # a guard that is ending its group ignores a second signal
            subprocess.run([sys.executable, "-c", stranger], timeout=60, check=True)
            wait_until(lambda: not is_pending(process.pid, signal.SIGTERM), "the guard has taken the signal")
        answer, _ = process.communicate("\n", timeout=60)
    assert (answer, process.returncode) == ("goes on\n", 0)


def test_a_stop_signal_of_the_parent_stops_the_command() -> None:
    command = guarded("print('up', flush=True); input()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.wait(60) == 0


def test_the_guard_ends_after_the_processes_that_its_command_left(tmp_path: Path) -> None:
    """The kernel needs a moment to take back a gibibyte, in which a server that starts again would lack it."""
    left = tmp_path / "left"
    worker = f"import os, time; b = bytearray(2**30); open({str(left)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import os, pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {worker!r}])
while not pathlib.Path({str(left)!r}).is_file() or not pathlib.Path({str(left)!r}).read_text():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(guarded(program), timeout=60, check=False)
    assert done.returncode == 128 + 9
    pid = int(left.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
