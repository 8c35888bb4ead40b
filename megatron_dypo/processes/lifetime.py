"""Processes that do not outlive the one that started them, and how to tell one process from another."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def end_with_parent() -> None:
    """Have this process get SIGTERM when its parent is gone, even by SIGKILL (Linux, ``prctl(2)``).

    SIGTERM gets its default action, which a trainer's children would otherwise inherit blocked.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    tie_to_parent()


def tie_to_parent() -> None:
    """Ask for SIGTERM when the parent is gone; a process that blocks SIGTERM sees it pending."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before the signal was asked for
        sys.exit(128 + signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """A process as no other one ever is: its number on one boot of one kernel, and when it started."""

    host: str
    machine: str
    """Boot and namespace of process numbers: two processes that agree on it can look each other up by ``pid``."""
    pid: int
    birth: str
    """When it started, in the kernel's clock ticks since boot; empty where the system does not say."""

    def is_on_this_machine(self) -> bool:
        """Whether :meth:`is_alive` can tell."""
        return bool(self.machine) and self.machine == _machine()

    def is_alive(self) -> bool:
        """Whether this very process still runs; ask only on its own machine. A zombie does not run."""
        birth = _birth(self.pid)
        return birth is not None and birth == self.birth


def own_identity() -> ProcessIdentity:
    """The identity of the calling process."""
    pid = os.getpid()
    return ProcessIdentity(host=platform.node(), machine=_machine(), pid=pid, birth=_birth(pid) or "")


def _machine() -> str:
    if not _BOOT_ID.is_file():
        return ""
    return f"{_BOOT_ID.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def _birth(pid: int) -> str | None:
    """Start time of a process; None if it has ended."""
    try:
        # The name, in parentheses, may hold anything; fields 3 and 22 of proc(5) follow it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
