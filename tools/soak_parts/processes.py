"""The processes of a run, by role."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil

_SERVERS = ("sglang_cpu.py", "sglang_keyed.py")
_GUARD, _VERIFIER, _COMMAND = "megatron_dypo.processes.guard", "megatron_dypo.grading.workers", "megatron_dypo.cli"
_LAUNCHER = "megatron_dypo.launch.torchrun"


@dataclass(frozen=True, kw_only=True)
class RunProcesses:
    """The processes of a run that live now, by role."""

    command: psutil.Process
    """The process that was started."""
    launcher: psutil.Process | None
    """That of the ranks; None if the command is the only rank, or no launcher lives now."""
    ranks: tuple[psutil.Process, ...]
    servers: tuple[psutil.Process, ...]
    """The main process of each SGLang server."""
    verifiers: tuple[psutil.Process, ...]
    all: tuple[psutil.Process, ...]
    """Those above and every other one."""

    def server_workers(self) -> tuple[psutil.Process, ...]:
        """Return the processes below the servers: schedulers, detokenizers and helpers."""
        found: dict[int, psutil.Process] = {}
        for server in self.servers:
            with contextlib.suppress(psutil.Error):
                found |= {one.pid: one for one in server.children(recursive=True)}
        return tuple(found.values())


def find_processes(command: psutil.Process) -> RunProcesses:
    """Return the processes of a run whose command still lives. Raises psutil.NoSuchProcess if it does not."""
    found = by_role(command, command.children(recursive=True))
    return replace(found, launcher=command) if found.ranks else replace(found, ranks=(command,), launcher=None)


def by_role(command: psutil.Process, others: Sequence[psutil.Process]) -> RunProcesses:
    """Tell the processes of a run apart by their command lines. ``others`` are all but the command."""
    lines = {process: line for process in others if (line := _line(process))}
    return RunProcesses(
        command=command,
        launcher=next((process for process, line in lines.items() if line.split()[1:3] == ["-m", _LAUNCHER]), None),
        ranks=tuple(process for process, line in lines.items() if _COMMAND in line and _is_rank(process)),
        servers=tuple(_of_servers(lines)),
        verifiers=tuple(process for process, line in lines.items() if _VERIFIER in line and _GUARD not in line),
        all=(command, *others),
    )


def _of_servers(lines: dict[psutil.Process, str]) -> Iterator[psutil.Process]:
    for process, line in lines.items():
        if _is_server(line):
            with contextlib.suppress(psutil.Error):
                # A server starts processes that may have its own command line.
                if not _is_server(lines.get(process.parent() or process, "")):
                    yield process


def _is_server(line: str) -> bool:
    return any(word in line for word in _SERVERS) and _GUARD not in line


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RANK" in process.environ()
    return False
