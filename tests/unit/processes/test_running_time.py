"""The clock that stands still while its process is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from megatron_dypo.processes.running_time import RunningTime, running_time

_PROGRAM = """
import time
from megatron_dypo.processes.running_time import running_time
start, running = time.monotonic(), running_time()
print("begun", flush=True)
input()
print(time.monotonic() - start, running_time() - running)
"""


def test_a_gap_between_readings_counts_as_one_second_and_a_short_one_in_full() -> None:
    clock = RunningTime()
    start = time.monotonic() + 1.0
    first = clock.advance(start)
    assert clock.advance(start + 4.0) == first + 4.0
    assert clock.advance(start + 3004.0) == first + 5.0
    assert clock.advance(start + 3004.5) == first + 5.5
    assert clock.advance(start + 3004.0) == first + 5.5, "a thread that read earlier comes later"


def test_it_runs_while_nobody_reads() -> None:
    begin, start = running_time(), time.monotonic()
    time.sleep(6.0)
    seconds = time.monotonic() - start
    assert seconds - 1.0 < running_time() - begin < seconds + 1.0


def test_a_process_does_not_count_the_time_in_which_it_was_stopped() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(8.0)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        passed, running = map(float, process.stdout.readline().split())
    assert passed > 8.0
    assert running < passed - 5.0


def test_a_forked_child_has_a_clock_of_its_own_that_runs() -> None:
    running_time()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        begin = running_time()
        time.sleep(6.0)
        os.write(write, str(running_time() - begin).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        assert float(file.read()) > 5.5
    os.waitpid(child, 0)
