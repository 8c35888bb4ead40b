"""A verifier process as the trainer sees it: start, feed, watch, kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing import Pipe
from pathlib import Path

from megatron_dypo.grading.worker import Outcome

_START_DEADLINE_S = 300.0
"""Importing sympy takes a second; on a machine that is starting a job, much longer."""

_EXIT_DEADLINE_S = 5.0


class WorkerDied(Exception):  # noqa: N818
    """The process ended, or ran over a deadline and was killed; the message says which."""


class WorkerProcess:
    """One process with the pairs that it was given and has not answered yet.

    ``connection`` can be waited on; ``deadline`` is the ``time.monotonic()`` by which it must have something to say
    (None when idle).
    """

    def __init__(self, import_path: str, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self.is_ready = False
        self.pending: deque[int] = deque()
        """Indices of unanswered pairs; the process works on the first."""
        self.connection, child = Pipe()
        # The verifier's module may lie where the run was started, which a console script's sys.path does not hold.
        paths = [*sys.path, str(Path.cwd())]
        code = (
            f"import sys; sys.path[:] = {paths!r}; from megatron_dypo.grading.worker import serve; "
            f"serve({child.fileno()}, {import_path!r}, {deadline_s!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(child.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a verifier prints is no output of the trainer's
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that a kill reaches the verifier's own children
        )
        child.close()
        self.deadline: float | None = time.monotonic() + _START_DEADLINE_S

    def send(self, indices: list[int], pairs: list[tuple[str, str]]) -> None:
        """Give an idle process ``pairs``. Raises :class:`WorkerDied` if it has ended."""
        try:
            self.connection.send(pairs)
        except ConnectionError as error:
            raise WorkerDied(self._ending()) from error
        self.pending = deque(indices)
        self.deadline = time.monotonic() + self._deadline_s

    def receive_start(self) -> None:
        """Read the first message. Raises ValueError with the worker's reason, or if it died importing."""
        try:
            problem = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ValueError(
                f"the process died while importing it: {self._ending()}, see its traceback above"
            ) from error
        if problem is not None:
            raise ValueError(problem)
        self.is_ready, self.deadline = True, None

    def receive(self) -> tuple[int, Outcome]:
        """Read one outcome: index of the pair and what came of it. Raises :class:`WorkerDied`."""
        try:
            outcome = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerDied(self._ending()) from error
        self.deadline = time.monotonic() + self._deadline_s if len(self.pending) > 1 else None
        return self.pending.popleft(), outcome

    def is_overdue(self) -> bool:
        """The deadline has passed and nothing waits to be read."""
        return self.deadline is not None and time.monotonic() > self.deadline and not self.connection.poll()

    def stop(self) -> None:
        """Kill the process and its children; returns when it is gone."""
        self.connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=_EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "verifier process closed its connection"
        if code < 0:
            return f"verifier process killed by {signal.Signals(-code).name}"
        return f"verifier process exited with {code}"
