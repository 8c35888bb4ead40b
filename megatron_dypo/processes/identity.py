"""The identity of a process, and whether it is alive."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """A unique name of a process: its number on one boot of one kernel, and its start time."""

    host: str
    machine: str
    """Boot and namespace of process numbers. Processes with the same value can look each other up by ``pid``."""
    pid: int
    birth: str
    """Start time in the kernel's clock ticks since boot; empty if the system does not tell."""

    def is_on_this_machine(self) -> bool:
        """Return whether :meth:`is_alive` can tell."""
        return bool(self.machine) and self.machine == _machine()

    def is_alive(self) -> bool:
        """Return whether this very process still runs. Call it only on the same machine. A zombie does not run."""
        birth = _birth(self.pid)
        return birth is not None and birth == self.birth


def own_identity() -> ProcessIdentity:
    """Return the identity of the calling process."""
    return identity_of(os.getpid())


def identity_of(pid: int) -> ProcessIdentity:
    """Return the identity of the process that has this number on this machine now."""
    return ProcessIdentity(host=platform.node(), machine=_machine(), pid=pid, birth=_birth(pid) or "")


def _machine() -> str:
    if not _BOOT_ID.is_file():
        return ""
    return f"{_BOOT_ID.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def stat_of(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` from the third (the state) on (proc(5)); None if the process has ended.

    A zombie has ended.
    """
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def _birth(pid: int) -> str | None:
    """Return the start time of a process, field 22; None if it has ended."""
    fields = stat_of(pid)
    return None if fields is None else fields[19]
