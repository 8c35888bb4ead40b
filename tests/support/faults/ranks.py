"""Starts of a run under faults: its ranks are forked, as in :mod:`tests.support.dist.spawn`, and end with a status."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.dist.spawn import environment, forking
from tests.support.fake_control import KEY
from tests.support.faults.injector import Injection, Injector

KEY_VARIABLE = "DYPO_SGLANG_API_KEY"
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of one start."""

    statuses: tuple[int, ...]
    """Exit status of each rank; −9 after SIGKILL."""
    output: str
    """What the ranks wrote to their terminals."""
    ended_at: float
    """Moment, on the monotonic clock, at which the last rank had ended."""

    def since_s(self, moment: float) -> float:
        """Return the seconds from a moment, on the monotonic clock, to the end."""
        return self.ended_at - moment


def start_ranks(
    config: Path,
    world_size: int,
    injections: Sequence[Injection],
    *,
    deadline_s: float,
    while_running: Callable[[Sequence[Any]], None] = lambda processes: None,
    ends_others_after_s: float | None = None,
) -> Ended:
    """Start the ranks of a run, and return how they ended.

    Args:
        while_running: is called again and again with the processes of the ranks.
        ends_others_after_s: time after which ranks are killed if another one was killed, as a launcher does at once;
            None: they must end by themselves.

    Raises:
        TimeoutError: a rank was still there at the deadline. All are killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context, began = forking(), time.monotonic()
    logs = [config.parent / f"rank_{rank}.out" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        variables = environment(rank, world_size, store.port) | {KEY_VARIABLE: KEY}
        process = context.Process(target=_rank, args=(variables, config, list(injections), log))
        process.start()
        processes.append(process)
    lost_at: float | None = None
    try:
        while any(process.is_alive() for process in processes):
            if lost_at is None and any(process.exitcode for process in processes):
                lost_at = time.monotonic()
            if lost_at and ends_others_after_s is not None and time.monotonic() - lost_at > ends_others_after_s:
                break
            if time.monotonic() - began > deadline_s:
                raise TimeoutError(f"a rank did not end in {deadline_s:g} s\n" + _read(logs))
            while_running(processes)
            time.sleep(_LOOK_EVERY_S)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return Ended(
        statuses=tuple(process.exitcode for process in processes),
        output=_read(logs),
        ended_at=time.monotonic(),
    )


def _read(logs: Sequence[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())


def _rank(variables: dict[str, str], config: Path, injections: list[Injection], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.launch import attempt
    from megatron_dypo.launch.start import launch, train_rank
    from megatron_dypo.processes import stop_requests

    stop_requests.hold_requests()  # as the command does first: threads that start from now on must not get them
    attempt.VICTIM_WAIT_S = 3.0  # a rank that was killed reports nothing; a launcher would end the others
    rank = int(variables["RANK"])
    Injector([one for one in injections if one.rank == rank], KEY).install()
    launch(load_config(config), ["train", str(config)], train_rank)
