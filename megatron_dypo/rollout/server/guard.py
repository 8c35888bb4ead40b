"""Run one command in a process group that never outlives the process that asked for it.

    python -I guard.py PARENT_PID GRACE_S COMMAND [ARGUMENT …]

The command gets a session of its own. When it ends, the guard ends with its exit status. When the parent sends the guard SIGTERM,
or the parent is gone (even by SIGKILL, which leaves it no time to clean up), the whole group gets SIGTERM, and after
``GRACE_S`` seconds SIGKILL: SGLang can hang indefinitely on a request that arrives while it shuts down.

A process and not PR_SET_PDEATHSIG: that signal comes when the *thread* that started the child ends, and cannot be
followed by SIGKILL.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_S = 0.5


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_STOP, signal.SIGCHLD])


def _wait(child: subprocess.Popen, parent: int) -> None:
    """Return when the child has ended, the parent is gone, or a stop signal has come."""
    while child.poll() is None and os.getppid() == parent:
        received = signal.sigtimedwait([*_STOP, signal.SIGCHLD], _POLL_S)
        # From the parent alone: Slurm may signal every process of a job step, and the trainer then still needs its
        # servers, to finish its step.
        if received is not None and received.si_signo in _STOP and received.si_pid == parent:
            return


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # no process of the group is left
        os.killpg(group, number)


def _end_group(child: subprocess.Popen, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    _signal_group(child.pid, signal.SIGTERM)
    while child.poll() is None and time.monotonic() < deadline:
        signal.sigtimedwait([signal.SIGCHLD], 0.1)
    # Also when the command itself has ended: its workers may not have.
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def main() -> int:
    parent, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    # Blocked, so that none is lost between two calls of sigtimedwait; the command starts without these blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_STOP, signal.SIGCHLD])
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_unblock)
    _wait(child, parent)
    status = child.poll()
    _end_group(child, grace_s)
    return 128 - status if status is not None and status < 0 else status or 0


if __name__ == "__main__":
    sys.exit(main())
