"""Processes that a run starts, and the signals between them.

Code that starts a process uses the functions of this module. The table shows who starts each process, which signals
reach it, and what ends it. STOP means SIGUSR1, SIGTERM, SIGINT and SIGHUP, the requests of
:mod:`megatron_dypo.processes.stop_requests`.

| process | started by | signals | ended by |
| --- | --- | --- | --- |
| launcher of a node | user, srun, `run_training` | STOP blocked; a thread takes them: the first is sent on to the
  ranks as SIGUSR1, a second SIGINT or SIGTERM ends the ranks at once | the end of its ranks |
| rank | launcher (torchrun), or the user | STOP blocked; a thread takes them: the first ends the run after its step,
  a second SIGINT or SIGTERM ends it at once | its last step; SIGTERM from its launcher, or because the launcher is
  gone |
| `megatron-dypo serve` | user, srun | SIGUSR1 blocked; SIGTERM, SIGINT and SIGHUP stop its servers | a signal; the
  loss of its servers |
| `megatron-dypo route` | user, srun | SIGUSR1 blocked; SIGTERM, SIGINT and SIGHUP stop its router | a signal; the end
  of its router |
| guard of a router, and sglang-router | `route`, in sessions of their own | as a server's | as a server's |
| guard of a server | rank, `serve` | STOP blocked; it obeys SIGTERM, SIGINT and SIGHUP of its parent alone | the end
  of its server; its parent's SIGTERM or end |
| SGLang server | guard, in a session of its own | SIGUSR1 blocked; SIGTERM by its guard | its guard: SIGTERM to the
  session, then SIGKILL after `stop_grace_s` |
| guard of a cell's command | `megatron-dypo compare`, in a session of its own | STOP blocked; it obeys SIGTERM, SIGINT
  and SIGHUP of its parent alone, and sends the command SIGTERM | the end of the command; its parent's SIGTERM or end |
| verifier process | rank, `check`, `grade`, in a session of its own | STOP has a handler that does nothing | the end
  of its connection; SIGKILL to its session at a deadline; SIGALRM if nobody is left to kill it |
| template process | whoever renders chat templates | STOP and SIGUSR2 ignored | the end of its connection; SIGPROF
  after 5 s of processor time |
| row checker | whoever opens prompts (multiprocessing, spawn) | SIGUSR1, SIGUSR2, SIGINT and SIGHUP blocked | the end
  of the check; SIGTERM, which the kernel sends when its parent is gone |
| checkpoint writer | a thread of a rank (Megatron-Core, fork) | STOP blocked | the end of its file; SIGKILL, which the
  kernel sends when that thread ends |
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_dypo.processes.identity import stat_of

STOP = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to stop."""
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.02
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_forking = threading.local()


def program(target: str, *arguments: object, isolated: bool = False) -> list[str]:
    """Return the command that calls ``target`` (``module:function``) with ``arguments`` in ``sys.argv[1:]``.

    The new interpreter has the same import path. It is not a ``multiprocessing`` child, which would import the
    trainer's main module, and with it torch and Megatron.

    Args:
        isolated: ignore environment variables that change the interpreter.
    """
    module, function = target.split(":")
    paths = [*sys.path, str(Path.cwd())]  # a user's module may be in the folder where the run was started
    code = f"import sys; sys.path[:] = {paths!r}; from {module} import {function}; sys.exit({function}())"
    flags = ["-u", "-I"] if isolated else ["-u"]  # unbuffered, so that output before a sudden end is not lost
    return [sys.executable, *flags, "-c", code, *map(str, arguments)]


@contextlib.contextmanager
def blocked(signals: Iterable[signal.Signals] = STOP) -> Iterator[None]:
    """Block signals in this thread inside the block. A process started in it begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock(*signals: signal.Signals) -> None:
    """Unblock signals that this process may have inherited blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to all processes of a group; nothing happens if none is left."""
    # PermissionError: the rest of the group belongs to another user.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def wait_for_group(group: int, deadline_s: float) -> bool:
    """Wait until no process of a group runs, and return whether that came within ``deadline_s``.

    A process that was killed runs until the kernel has taken back its memory and that of its GPUs. A zombie does not
    run. Where there is no ``/proc``, it counts until its parent has reaped it.
    """
    deadline = time.monotonic() + deadline_s
    while _runs(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _runs(group: int) -> bool:
    """Return whether a process of the group runs."""
    with contextlib.suppress(PermissionError):  # the rest of the group belongs to another user
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    # Field 5 of proc(5) is the group.
    return not pids or any(fields[2] == str(group) for fields in map(stat_of, pids) if fields is not None)


def end_with_parent(parent: int) -> None:
    """Make this process get SIGTERM when its ``parent`` ends, even by SIGKILL (Linux, ``prctl(2)``).

    SIGTERM is unblocked and gets its default action; children of a trainer would otherwise inherit it blocked.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unblock(signal.SIGTERM)
    signal_at_parents_end(signal.SIGTERM, parent)


def signal_at_parents_end(number: signal.Signals, parent: int) -> None:
    """Ask the kernel for a signal when the parent ends, or when its thread that started this process ends.

    Args:
        parent: the number that the parent gave as its own. If it has ended before this call, the signal comes at once.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def forks_end_with_this_thread() -> Iterator[None]:
    """Let processes that this thread forks inside the block be killed when the thread ends, or its process (Linux).

    A fork has its parent's sockets. If it outlived the parent, other ranks would not see that their connections to it
    are lost.
    """
    _forking.parent = os.getpid()
    try:
        yield
    finally:
        _forking.parent = None


def _tie_fork() -> None:
    if parent := getattr(_forking, "parent", None):
        signal_at_parents_end(signal.SIGKILL, parent)


os.register_at_fork(after_in_child=_tie_fork)


def wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended, without reaping it, so that its number is not reused yet."""
    with contextlib.suppress(ChildProcessError):  # already reaped
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def end_of(process: subprocess.Popen[bytes]) -> Connection:
    """Return a connection that becomes readable when the process has ended, even if its children live on."""
    ours, theirs = Pipe(duplex=False)

    def tell() -> None:
        wait_for_end(process)
        with theirs, contextlib.suppress(OSError):  # nobody waits any more
            theirs.send_bytes(b"ended")

    threading.Thread(target=tell, name=f"end of {process.pid}", daemon=True).start()
    return ours
