"""The processes of a run, found from the one that was started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

_SERVERS = ("sglang_cpu.py", "sglang.launch_server")
_GUARD, _VERIFIER, _COMMAND = "megatron_dypo.processes.guard", "megatron_dypo.grading.workers", "megatron_dypo.cli"


@dataclass(frozen=True, kw_only=True)
class RunProcesses:
    """The processes of a run that live now, by role."""

    command: psutil.Process
    """The process that was started: the launcher of several ranks, or the only rank."""
    ranks: tuple[psutil.Process, ...]
    servers: tuple[psutil.Process, ...]
    """The main process of each SGLang server."""
    verifiers: tuple[psutil.Process, ...]
    all: tuple[psutil.Process, ...]
    """Those above and every other descendant."""

    @property
    def has_launcher(self) -> bool:
        """Whether the command is not a rank itself."""
        return self.command not in self.ranks


def find_processes(command: psutil.Process) -> RunProcesses:
    """Return the processes of a run whose command still lives. Raises psutil.NoSuchProcess if it does not."""
    descendants = command.children(recursive=True)
    lines = {process: line for process in descendants if (line := _line(process))}
    ranks = tuple(process for process, line in lines.items() if _COMMAND in line and _is_rank(process))
    return RunProcesses(
        command=command,
        ranks=ranks or (command,),
        servers=tuple(_of_servers(lines)),
        verifiers=tuple(process for process, line in lines.items() if _VERIFIER in line and _GUARD not in line),
        all=(command, *descendants),
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
