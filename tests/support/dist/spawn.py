"""Run a function on N ranks: real processes over gloo, each with one thread, a deadline and its own rendezvous.

Ranks are forked from a process that has imported Megatron and done nothing else: the import is slower than most tests.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from megatron_dypo.mcore import features

START_METHOD = "TESTS_START_METHOD"
"""Environment variable: ``fork`` in a process that has only imported Megatron and ends after one file of tests."""


class RankError(AssertionError):
    """The failure of a rank that raised, died or did not finish; the message has the output of every rank."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, deadline_s: float = 480.0) -> list[Any]:
    """Run ``function(*args)`` on each of ``world_size`` ranks, in the environment that torchrun would give them.

    ``function`` is a module-level function; arguments and results are pickled. It calls ``start_megatron`` or
    :func:`join_world` itself.

    Returns:
        The results, by rank.

    Raises:
        RankError: a rank raised or died (the others are then stopped), or the deadline passed.
    """
    # The parent keeps the store, as torchrun's agent does, so that no port is chosen before it is bound.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = forking()
    processes, pipes = [], []
    for rank in range(world_size):
        receiving, sending = context.Pipe(duplex=False)
        # Not daemonic: Megatron's checkpoint writer starts processes of its own.
        process = context.Process(
            target=_run, args=(sending, environment(rank, world_size, store.port), function, args)
        )
        process.start()
        sending.close()
        processes.append(process)
        pipes.append(receiving)
    try:
        return _collect(pipes, time.monotonic() + deadline_s)
    finally:
        for process in processes:
            process.join(timeout=10)
            # Whatever is left of the rank's session: the rank itself, or processes that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


def join_world(timeout: datetime.timedelta | None = None) -> None:
    """Join the gloo group of all ranks, and wait until all are in it.

    gloo lets a rank go as soon as its own connections stand. A rank that then leaves would close connections that its
    peers are still making, and they would fail in its place.
    """
    dist.init_process_group("gloo", timeout=timeout)
    dist.barrier()


def forking() -> Any:
    """Return the multiprocessing context that forks from the process with the imports."""
    context: Any = mp.get_context(os.environ.get(START_METHOD, "forkserver"))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["tests.support.dist.preloaded"])
    return context


def _run(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    try:
        features.shield_imports()
        pipe.send((True, function(*args)))
    except BaseException:  # noqa: BLE001, whatever stopped a rank is for the parent to raise
        pipe.send((False, traceback.format_exc()))
        # A rank that failed holds collectives open; its peers must not wait for it.
        pipe.close()
        os._exit(1)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not finish by the deadline")
        failures = []
        for pipe in [pipe for pipe in waiting if pipe in ready]:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, "died without a word"
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"--- rank {rank}\n{value}")
        if failures:
            raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return this process's environment with the variables that torchrun adds."""
    added = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "OMP_NUM_THREADS": 1,
    }
    return {**os.environ, **{name: str(value) for name, value in added.items()}}
