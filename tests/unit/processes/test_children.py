"""Processes that a run starts: their initial state, and how their end is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest

from megatron_dypo.processes import children
from megatron_dypo.processes.children import (
    STOP,
    blocked,
    end_of,
    program,
    signal_group,
    wait_for_end,
    wait_for_group,
)
from tests.support.present import present

DOCS = Path(__file__).parents[3] / "docs/processes.md"


def table(text: str) -> list[str]:
    """Return the rows of the first table; in the module a row continues in indented lines."""
    _, _, rest = text.partition("\n|")
    rows = f"|{rest}".partition("\n\n")[0].replace("\n  ", " ")
    return rows.splitlines()


def test_the_page_has_the_table_of_the_module() -> None:
    assert table(DOCS.read_text(encoding="utf-8")) == table(children.__doc__ or "")
    assert len(table(children.__doc__ or "")) > 10


def test_a_program_gets_its_arguments_and_finds_what_this_process_finds() -> None:
    command = program("tests.unit.processes.echo_program:main", 3, "two words", isolated=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "['3', 'two words']\n"), done.stderr


def test_a_process_begins_with_the_signals_blocked_that_its_starter_blocks_for_it() -> None:
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with blocked():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for number in STOP:
        assert repr(number) in done.stdout
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_the_end_of_a_process_is_known_though_its_child_lives_on_and_holds_its_pipes() -> None:
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with process, end_of(process) as end:
        assert not end.poll()
        present(process.stdin).close()
        assert wait([end], timeout=20) == [end]
        assert process.poll() == 1
        signal_group(process.pid, signal.SIGKILL)


def test_whoever_waits_for_an_end_leaves_the_process_to_be_reaped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    wait_for_end(process)
    assert Path(f"/proc/{process.pid}").exists()
    assert process.wait() == 5
    wait_for_end(process)  # the process is reaped already: there is nothing to wait for


def test_a_server_does_not_outlive_a_guard_that_is_killed() -> None:
    server = "import time; print('runs', flush=True); time.sleep(600)"
    command = program("megatron_dypo.processes.guard:main", os.getpid(), 0.2, sys.executable, "-c", server)
    guard = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with guard:
        assert guard.stdout is not None
        assert guard.stdout.readline() == "runs\n"
        guard.kill()
        assert guard.stdout.read() == ""  # no process holds the pipe any more


def test_a_signal_to_a_group_without_processes_is_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    signal_group(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("ended_thread", [False, True])
def test_a_guard_outlives_the_thread_that_started_it_and_not_the_process(tmp_path: Path, ended_thread: bool) -> None:
    """The kernel sends its signal in both cases."""
    server = "import os, signal, time; print(os.getpid(), flush=True); time.sleep(600)"
    trainer = f"""
import os, subprocess, sys, threading
from megatron_dypo.processes.children import program
def start():
    global guard
    command = program("megatron_dypo.processes.guard:main", os.getpid(), 0.2, sys.executable, "-c", {server!r})
    guard = subprocess.Popen(command, start_new_session=True)
thread = threading.Thread(target=start)
thread.start() if {ended_thread} else start()
{"thread.join()" if ended_thread else ""}
print("started", flush=True)
sys.stdin.readline()
print(guard.poll(), flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", trainer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines = {process.stdout.readline(), process.stdout.readline()}
    (server_pid,) = [int(line) for line in lines if line != "started\n"]
    process.stdin.write("\n")
    assert process.stdout.readline() == "None\n", "the guard runs"
    assert Path(f"/proc/{server_pid}").exists()
    process.stdin.write("\n")
    # Nobody holds the pipe any more: trainer, guard and server have ended.
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.append(present(process.stdout).read()), daemon=True)
    reader.start()
    reader.join(20)
    assert rest == [""]
    process.wait()


FORKING = """
import contextlib, multiprocessing, sys, time
from megatron_dypo.processes.children import forks_end_with_this_thread

with forks_end_with_this_thread() if sys.argv[1] == "tied" else contextlib.nullcontext():
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    fork.start()
print(fork.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_process_whose_parent_has_ended_already_gets_the_signal_at_once(number: str) -> None:
    code = "import os, signal; from megatron_dypo.processes.children import signal_at_parents_end as ask; "
    code += f"ask(signal.{number}, os.getppid()); print('lives', flush=True); ask(signal.{number}, os.getpid())"
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert (child.stdout, child.returncode) == ("lives\n", -signal.Signals[number])


LATE_FORKING = """
import os, signal, sys, time
from megatron_dypo.processes import children

# The fork runs only after its parent has been killed, as it may on a busy machine.
tie, parent = children.signal_at_parents_end, os.getpid()
def late(number, of):
    while os.getppid() == parent:
        time.sleep(0.01)
    tie(number, of)
children.signal_at_parents_end = late
with children.forks_end_with_this_thread():
    fork = os.fork()
if not fork:
    time.sleep(600)
print(fork, flush=True)
time.sleep(600)
"""


def test_a_tied_fork_that_first_runs_after_its_parents_end_ends_too() -> None:
    parent = subprocess.Popen([sys.executable, "-c", LATE_FORKING], stdout=subprocess.PIPE, text=True)
    fork = psutil.Process(int(present(parent.stdout).readline()))
    parent.kill()
    parent.wait()
    present(parent.stdout).close()
    _, alive = psutil.wait_procs([fork], timeout=20.0)
    for one in alive:
        one.kill()
    assert not alive


@pytest.mark.parametrize("how", ["tied", "not tied"])
def test_a_fork_that_is_tied_does_not_outlive_a_process_that_is_killed(how: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKING, how], stdout=subprocess.PIPE, text=True)
    fork = psutil.Process(int(present(parent.stdout).readline()))
    assert fork.is_running()
    parent.kill()
    parent.wait()
    present(parent.stdout).close()
    _, alive = psutil.wait_procs([fork], timeout=20.0 if how == "tied" else 0.5)
    assert bool(alive) is (how == "not tied")
    for one in alive:
        one.kill()


def test_a_group_is_waited_for_until_none_of_it_runs() -> None:
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint('up', flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert present(process.stdout).readline() == "up\n"
    assert not wait_for_group(process.pid, 0.1)
    process.kill()
    process.wait()
    assert not wait_for_group(process.pid, 0.1), "its child runs"
    signal_group(process.pid, signal.SIGKILL)
    assert wait_for_group(process.pid, 20.0)
    present(process.stdout).close()


def test_a_zombie_of_a_group_is_not_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    wait_for_end(process)
    assert wait_for_group(process.pid, 20.0)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
