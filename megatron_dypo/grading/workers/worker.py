"""The program of a verifier process: it imports the verifiers, then judges the pairs that it receives."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_dypo.grading.workers.calling import Caller, load_caller
from megatron_dypo.grading.workers.judging import GRACE_S, Judge
from megatron_dypo.processes.children import STOP


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The first message to a process: everything that it needs."""

    paths: Mapping[str, str]
    """Verifier's name → import path."""
    options: Mapping[str, Mapping[str, Any]]
    """Verifier's name → keyword arguments of every call."""
    built_in: frozenset[str]
    deadline_s: float
    start_deadline_s: float


def main() -> None:
    """Answer on the connection whose descriptor is the first argument, until it is closed.

    It receives a :class:`Setup`, then batches (verifier's name, items).

    The first answer is {"problems": {name: reason}, "callers": {name: [mode, fields]}}. Then [number, is_correct,
    reward, error] follows for each pair as soon as it is judged. Answers are JSON, so that a verifier cannot make the
    trainer run code.
    """
    _leave_stopping_to_the_trainer()
    faulthandler.enable()
    # A process that is ended leaves no file core in the run folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # not on Linux, or not allowed
        # If memory runs out, the kernel should end a verifier rather than a trainer or a server.
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection = Connection(int(sys.argv[1]))
    try:
        setup: Setup = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, setup.start_deadline_s + GRACE_S)
        callers, problems = _load(setup)
        signal.setitimer(signal.ITIMER_REAL, 0)
        described = {name: (c.signature.mode, c.signature.fields) for name, c in callers.items()}
        connection.send_bytes(json.dumps({"problems": problems, "callers": described}).encode())
        judge = Judge(connection, callers, setup.deadline_s)
        while not problems:
            name, items = connection.recv()
            judge.judge(name, items)
    except (EOFError, ConnectionError):
        return


def _leave_stopping_to_the_trainer() -> None:
    """Ignore the signals that ask a run to stop. The trainer closes the connection, and that ends this process.

    The trainer has started this process with these signals blocked. A handler is used, since unlike SIG_IGN it is lost
    at ``exec``, so that processes that a verifier starts do not ignore the signals.
    """

    def survive(number: int, frame: FrameType | None) -> None:
        pass

    def unset() -> None:
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
        hold(signal.SIG_UNBLOCK)

    def hold(how: int) -> None:
        signal.pthread_sigmask(how, STOP)

    for number in STOP:
        signal.signal(number, survive)
    # Block the signals during a fork. Otherwise a child that is stopped at once would lose the signal to this handler.
    os.register_at_fork(
        before=partial(hold, signal.SIG_BLOCK),
        after_in_parent=partial(hold, signal.SIG_UNBLOCK),
        after_in_child=unset,
    )
    hold(signal.SIG_UNBLOCK)


def _load(setup: Setup) -> tuple[dict[str, Caller], dict[str, str]]:
    callers, problems = {}, {}
    for name, path in setup.paths.items():
        try:
            callers[name] = load_caller(path, setup.options.get(name, {}), is_built_in=name in setup.built_in)
        except ValueError as error:
            problems[name] = str(error)
    return callers, problems
