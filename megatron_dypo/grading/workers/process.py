"""The trainer's side of a verifier process: start it, send pairs, watch it, kill it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from megatron_dypo.grading.workers.judging import MAX_PROCESSOR_S, WHOLE_BATCH, Item, Outcome
from megatron_dypo.grading.workers.output import OutputTap
from megatron_dypo.grading.workers.signature import Mode
from megatron_dypo.grading.workers.worker import Setup
from megatron_dypo.processes.children import blocked, end_of, program, signal_group

_SLACK_S = 1.0
"""The process observes ``deadline_s`` itself if it can; the trainer kills it this many seconds later."""

_EXIT_DEADLINE_S = 5.0

_SOCKET_BYTES = 64 * 1024
"""A message up to this size waits in the socket; a larger one waits for its reader."""


class WorkerDied(Exception):  # noqa: N818
    """The process ended, or exceeded a deadline and was killed; the message says which."""


@dataclass(frozen=True, kw_only=True)
class CallerInfo:
    """Facts about an imported verifier that the trainer needs."""

    mode: Mode
    fields: tuple[str, ...]
    """Fields of a pair that it asks for."""


class ImportFailed(ValueError):  # noqa: N818 (a user's mistake, shown by its message)
    """Verifiers could not be imported: ``problems`` says why, by the verifier's name."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name!r}: {problem}" for name, problem in problems.items()))
        self.problems = problems


class WorkerProcess:
    """One process, with the pairs that it has not answered yet.

    ``connection`` becomes readable when the process has sent something, and ``end`` when it has ended, even if its
    children keep the connection open. ``deadline`` is the ``time.monotonic()`` by which one of the two must happen
    (None when idle).
    """

    def __init__(self, setup: Setup, tap: OutputTap) -> None:
        self._setup = setup
        self.callers: dict[str, CallerInfo] = {}
        self.is_ready = False
        self.mode: Mode = "one"
        """How the pending pairs are judged."""
        self.pending: deque[int] = deque()
        """Numbers of unanswered pairs. In mode ``one`` the process works on the first; else on all of them."""
        self.connection, child = Pipe()
        with child:
            self._process = _start(child.fileno())
        self.end = end_of(self._process)
        assert self._process.stdout is not None
        self._output = tap.follow(self._process.stdout)
        self.deadline: float | None = time.monotonic() + setup.start_deadline_s
        with suppress(ConnectionError):  # it has ended: receive_start says how
            self.connection.send(setup)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def give(self, name: str, items: Sequence[Item]) -> None:
        """Give an idle process ``items`` for one verifier. Raises :class:`WorkerDied` if it has ended."""
        size = sum(len(payload) for _, payload in items)
        watch = threading.Timer(self._setup.deadline_s + _SLACK_S, self._kill)
        if size > _SOCKET_BYTES:
            watch.start()  # a process that was stopped would not read it
        try:
            self.connection.send((name, items))
        except ConnectionError as error:
            raise WorkerDied(self._ending()) from error
        finally:
            watch.cancel()
        self.mode = self.callers[name].mode
        self.pending = deque(number for number, _ in items)
        self.deadline = self._next_deadline()

    def await_start(self) -> None:
        """Wait for the first message and read it.

        Raises:
            ImportFailed: a verifier cannot be imported, or the import takes too long.
        """
        assert self.deadline is not None
        wait([self.connection, self.end], max(0.0, self.deadline - time.monotonic()))
        if self.connection.poll():
            self.receive_start()
        elif ending := self.ending_if_dead():
            raise self._died_importing(ending)
        else:
            raise ImportFailed(dict.fromkeys(self._setup.paths, "its import takes too long"))

    def receive_start(self) -> None:
        """Read the first message. Raises :class:`ImportFailed` with the process's reasons, or if it died importing."""
        try:
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:
            raise self._died_importing(self._ending()) from error
        if message["problems"]:
            raise ImportFailed(message["problems"])
        self.callers = {
            name: CallerInfo(mode=mode, fields=tuple(fields)) for name, (mode, fields) in message["callers"].items()
        }
        self.is_ready, self.deadline = True, None

    def receive(self) -> tuple[int, Outcome]:
        """Read one outcome: the number of a pending pair, or WHOLE_BATCH, and its result.

        Raises :class:`WorkerDied`, also if the process sends something else.
        """
        try:
            number, is_correct, reward, problem = _parse_outcome(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerDied(self._ending()) from error
        except ValueError as error:
            raise WorkerDied("the verifier process wrote to the trainer's connection") from error
        if number == WHOLE_BATCH and self.mode == "batch" and len(self.pending) > 1:
            self.deadline = None
            return number, (is_correct, reward, problem)
        if number not in self.pending or (self.mode == "one" and number != self.pending[0]):
            raise WorkerDied("the verifier process answered for another pair than its own")
        self.pending.remove(number)
        if not self.pending:
            self.deadline = None
        elif self.mode == "one":
            self.deadline = self._next_deadline()
        return number, (is_correct, reward, problem)

    def is_overdue(self) -> bool:
        """Return whether the deadline has passed and nothing waits to be read."""
        return self.deadline is not None and time.monotonic() > self.deadline and not self.connection.poll()

    def ending_if_dead(self) -> str | None:
        """Return how the process ended; None if it runs."""
        return self._ending() if self.end.poll() else None

    def stop(self) -> None:
        """Kill the process and its children; return when it is gone."""
        self.connection.close()
        self._kill()
        self._process.wait()
        self.end.close()
        self._output.join(timeout=1.0)

    def _died_importing(self, ending: str) -> ImportFailed:
        problem = f"the process died while importing it: {ending}, see its output above"
        return ImportFailed(dict.fromkeys(self._setup.paths, problem))

    def _kill(self) -> None:
        # Also kill children, even if the process itself is gone. Its id is that of their group, so it cannot be reused
        # while a child lives.
        signal_group(self._process.pid, signal.SIGKILL)

    def _next_deadline(self) -> float:
        return time.monotonic() + self._setup.deadline_s + _SLACK_S

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=_EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "verifier process closed its connection"
        if code == -signal.SIGKILL:
            return "verifier process killed by SIGKILL (often the kernel, for memory)"
        if code == -signal.SIGXCPU:
            return f"no verdict within {MAX_PROCESSOR_S} s of processor time"
        if code < 0:
            return f"verifier process killed by {_signal_name(-code)}"
        return f"verifier process exited with {code}"


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    # Block signals until the process handles them itself. Otherwise a request to stop the run would end it.
    with blocked():
        return subprocess.Popen(
            program("megatron_dypo.grading.workers.worker:main", descriptor),
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # what a verifier prints is no output of the trainer's
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that a kill reaches the verifier's own children
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _parse_outcome(message: bytes) -> tuple[int, bool, float, str | None]:
    fields: Any = json.loads(message)
    if not isinstance(fields, list) or [type(field) for field in fields[:3]] != [int, bool, float] or len(fields) != 4:
        raise ValueError(f"no outcome: {message[:80]!r}")
    if not isinstance(fields[3], str | None):
        raise ValueError(f"no outcome: {message[:80]!r}")
    return fields[0], fields[1], fields[2], fields[3]
