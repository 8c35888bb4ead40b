"""Requests to stop, in processes of their own: pytest's mask does not change. test_end_of_a_rank.py tests reactions."""

import subprocess
import sys

import pytest

ASKED = """
import os, signal, subprocess, sys
from megatron_dypo.processes.stop_requests import hold_requests, is_requested
hold_requests()
assert not is_requested()
os.kill(os.getpid(), signal.SIGUSR1)
assert is_requested()
program = "import os; os.kill(os.getpid(), 10); print('alive')"
child = subprocess.run([sys.executable, "-c", program], capture_output=True)
print(child.stdout.decode().strip())
"""


@pytest.mark.parametrize("shell", ['exec "$@"', 'trap "" USR1; exec "$@"'])
def test_a_request_is_held_for_the_process_and_harmless_to_its_children(shell):
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", ASKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_request_is_seen_before_anybody_listens(name):
    program = f"""
import os, signal
from megatron_dypo.processes.stop_requests import hold_requests, is_requested
hold_requests()
os.kill(os.getpid(), signal.{name})
print(is_requested())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_nobody_is_asked_to_stop_who_does_not_hold_requests():
    program = "from megatron_dypo.processes.stop_requests import is_requested; print(is_requested())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_server_is_not_hurt_by_a_request_to_its_trainer_and_ends_on_sigterm():
    program = """
import os, signal
from megatron_dypo.processes.stop_requests import ignore_requests
ignore_requests()
os.kill(os.getpid(), signal.SIGUSR1)
print("alive", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-15, "alive\n", "")


def test_a_program_under_the_guard_lives_through_a_request_to_its_trainer():
    program = """
import os, subprocess, sys
from megatron_dypo.processes.stop_requests import hold_requests
from megatron_dypo.processes.children import program
hold_requests()
server = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive', flush=True)"
command = program("megatron_dypo.processes.guard:main", os.getpid(), 5, sys.executable, "-c", server, isolated=True)
sys.exit(subprocess.run(command).returncode)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
