"""The trainer's side of :mod:`megatron_dypo.data.tokenizer.template_worker`: one process for all templates of a trainer
process.

It starts with the first template (0.1 s) and takes about 0.1 ms for each prompt.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from megatron_dypo.data.tokenizer.template_worker import CPU_LIMIT_S, FAILED, MEMORY_LIMIT, OK, REFUSED, TEXT_LIMIT
from megatron_dypo.processes.children import blocked, program

ANSWER_DEADLINE_S = 300.0
"""Seconds for an answer. Unless the process is stopped, the limit of processor time is reached first."""


class TemplateError(ValueError):
    """A template is not jinja2, raised an error, or exceeded a limit. The text is the reason."""


class TemplateRefusedError(TemplateError):
    """A template called ``raise_exception`` because it does not accept the messages. The text is the template's own."""


class _GoneError(Exception):
    """The process ended without an answer; the argument is its exit status."""


class TemplateProcess:
    """A process that renders templates under limits. Threads may share it; a forked process starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        os.register_at_fork(after_in_child=self._leave_to_parent)
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """Return the number of the process; None if there is none."""
        return None if self._process is None else self._process.pid

    def variables(self, template: str) -> frozenset[str]:
        """Return the names that ``template`` reads from outside. Raises TemplateError if it is not valid jinja2."""
        return frozenset(self._ask(template, None).split("\n")) - {""}

    def render(self, template: str, arguments: Mapping[str, Any]) -> str:
        """Return the text that ``template`` writes. Raises TemplateError or TemplateRefusedError."""
        return self._ask(template, dict(arguments))

    def close(self) -> None:
        """End the process, if there is one; the next request starts another."""
        with self._lock:
            self._end()

    def _ask(self, template: str, arguments: dict[str, Any] | None) -> str:
        request = pickle.dumps((template, arguments))
        if len(request) > TEXT_LIMIT:
            raise TemplateError(f"messages and template have {len(request)} bytes: they may have at most {TEXT_LIMIT}")
        with self._lock:
            try:
                content = self._exchange(request)
            except _GoneError:
                # Try once more, since something else may have killed the process. A template that kills it does so
                # again.
                try:
                    content = self._exchange(request)
                except _GoneError as error:
                    raise TemplateError(f"its process ended twice without an answer: {error}") from error
        text = content[1:].decode("utf-8", "surrogatepass")
        if content[:1] == OK:
            return text
        raise {FAILED: TemplateError, REFUSED: TemplateRefusedError}[content[:1]](text)

    def _exchange(self, request: bytes) -> bytes:
        connection = self._connection or self._start()
        try:
            connection.send_bytes(request)
            if connection.poll(ANSWER_DEADLINE_S):
                return connection.recv_bytes(2 * TEXT_LIMIT)
        except (EOFError, ConnectionError):
            status = self._end()
            if status == -signal.SIGPROF:
                raise TemplateError(f"takes more than {CPU_LIMIT_S} s of processor time") from None
            raise _GoneError(_describe(status)) from None
        self._end()
        raise TemplateError(f"gives no answer in {ANSWER_DEADLINE_S:g} s")

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        command = program("megatron_dypo.data.tokenizer.template_worker:main", theirs.fileno())
        env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        with theirs, blocked():
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env)
        self._connection = ours
        return ours

    def _end(self) -> int | None:
        if self._process is None or self._connection is None:
            return None
        self._connection.close()
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process = self._connection = None
        return status

    def _leave_to_parent(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.returncode = 0  # not a child of this process: there is nothing to wait for
        # A thread that does not exist in the forked process may hold the lock.
        self._lock, self._process, self._connection = threading.Lock(), None, None


def _describe(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    return f"{signal.Signals(-status).name} (its memory is limited to {MEMORY_LIMIT >> 20} MiB)"


TEMPLATES = TemplateProcess()
"""The one process of this trainer process."""
