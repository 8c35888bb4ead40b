import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_dypo.processes.identity import own_identity
from tests.support.present import present

CHILD = """
import signal, sys
from megatron_dypo.processes.children import end_with_parent
end_with_parent(int(sys.argv[1]))
print('ready', flush=True)
signal.pause()
"""
PARENT = f"""
import os, signal, subprocess, sys
command = [sys.executable, "-c", {CHILD!r}, str(os.getpid())]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.dup2(2, 1)  # of the pipe to the test only the child's standard error is left
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("inherited", [[], [signal.SIGTERM]])
def test_a_process_ends_with_a_parent_that_was_killed(inherited):
    # communicate() returns when nobody holds the pipes any more: the child has ended too.
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {[int(s) for s in inherited]})\n{PARENT}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, _ = parent.communicate(timeout=60)
    assert int(output.split()[0]) > 1


def test_a_process_is_known_by_more_than_its_number():
    own = own_identity()
    assert own.pid == os.getpid()
    assert own.is_on_this_machine()
    assert own.is_alive()
    assert not replace(own, birth="1").is_alive()
    assert not replace(own, machine="another").is_on_this_machine()


def test_a_zombie_is_not_alive():
    code = "from megatron_dypo.processes.identity import own_identity as own; "
    code += "print(own().pid, own().birth, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, birth = present(child.stdout).readline().split()
    identity = replace(own_identity(), pid=int(pid), birth=birth)
    assert identity.is_alive()
    present(child.stdin).close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert not identity.is_alive()
    child.wait()
    assert not identity.is_alive()
