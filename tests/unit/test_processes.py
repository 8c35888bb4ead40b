import subprocess
import sys

CHILD = "from megatron_dypo.processes import end_with_parent; end_with_parent(); print('ready', flush=True); import signal; signal.pause()"
PARENT = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.dup2(2, 1)  # of the pipe to the test only the child's standard error is left
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_with_a_parent_that_was_killed():
    # communicate() returns when nobody holds the pipes any more: the child has ended too.
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, _ = parent.communicate(timeout=60)
    assert int(output.split()[0]) > 1
