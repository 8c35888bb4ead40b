"""Run one command in a process group that never outlives the process that asked for it.

Arguments of the program: ``PARENT_PID GRACE_S COMMAND [ARGUMENT …]``. The command gets its own session. When it ends,
the guard ends with its exit status. When the parent sends SIGTERM or is gone (even by SIGKILL, which leaves it no time
to clean up), the whole group gets SIGTERM, and after ``GRACE_S`` seconds SIGKILL, since SGLang can hang indefinitely on
a request that arrives while it shuts down. The guard ends when no process of the group runs any more.

The kernel's own signal (PR_SET_PDEATHSIG) is not enough: it cannot be followed by SIGKILL, and it also comes when the
*thread* that started a process ends. So this process stands in between, and the signal only makes it look.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_dypo.processes.children import signal_at_parents_end, signal_group, unblock, wait_for_group

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_KILLED_S = 10.0
"""Longest time that killed processes are waited for. One that waits for a device or a file system may never end."""


def _wait(child: subprocess.Popen[bytes], parent: int) -> None:
    """Return when the child has ended, the parent is gone, or the parent has sent a stop signal."""
    while child.poll() is None and os.getppid() == parent:
        received = signal.sigwaitinfo([*_STOP, signal.SIGCHLD])
        # Only from the parent: Slurm may signal every process of a job step, and the trainer still needs its servers to
        # finish its step.
        if received.si_signo in _STOP and received.si_pid == parent:
            return


def _end_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    signal_group(child.pid, signal.SIGTERM)
    while child.poll() is None and (left_s := deadline - time.monotonic()) > 0:
        signal.sigtimedwait([signal.SIGCHLD], left_s)
    # Also if the command itself has ended, since its workers may still run.
    signal_group(child.pid, signal.SIGKILL)
    child.wait()
    # A command that is started again needs the memory and the ports of the one before.
    wait_for_group(child.pid, _KILLED_S)


def _prepare_command(guard: int) -> None:
    """Prepare the command's process: unblock signals, and make it end if the guard is killed."""
    unblock(*_STOP, signal.SIGCHLD)
    signal_at_parents_end(signal.SIGKILL, guard)


def guard(parent: int, grace_s: float, command: Sequence[str]) -> int:
    """Run ``command`` and return its exit status; ``parent`` is the process that it must not outlive."""
    # Block the signals, so that none is lost between two waits. The command starts with them unblocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_STOP, signal.SIGCHLD])
    signal_at_parents_end(signal.SIGCHLD, parent)
    prepare = functools.partial(_prepare_command, os.getpid())
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=prepare)
    _wait(child, parent)
    status = child.poll()
    _end_group(child, grace_s)
    return 128 - status if status is not None and status < 0 else status or 0


def main() -> int:
    """Run the command of the arguments and return its exit status."""
    return guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
