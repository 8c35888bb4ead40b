"""The calls of verifiers in their process: one pair at a time, several at the same time, or lists."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from megatron_dypo.config.words import counted
from megatron_dypo.grading.workers.calling import Caller
from megatron_dypo.grading.workers.results import read_result, shown
from megatron_dypo.processes.importing import describe

Outcome = tuple[bool, float, str | None]
"""is_correct, reward, error: the fields of a Verdict."""

Item = tuple[int, bytes]
"""A pair's number, and field → value for what its verifier asks for, pickled."""

WHOLE_BATCH = -1
"""In the outcome of a failed batched call, this replaces a pair's number. Each of its pairs is then tried alone."""

GRACE_S = 5.0
"""Seconds after its deadline at which a process ends itself, if the trainer has not killed it."""


MAX_PROCESSOR_S = 2
"""Most seconds of processor time of one verdict of a built-in verifier. For some formulas (``9^{9^{9^9}}``) it would
never end."""


def late_error(deadline_s: float) -> str:
    """Return the error of a verification that took longer than its deadline."""
    return f"no verdict within deadline_s={deadline_s:g}"


class Judge:
    """Calls verifiers and sends the outcomes."""

    def __init__(self, connection: Connection, callers: Mapping[str, Caller], deadline_s: float) -> None:
        self._connection, self._callers, self._deadline_s = connection, callers, deadline_s
        self._pid = os.getpid()
        self._home = os.open(".", os.O_RDONLY)
        # A module may have set a handler of its own when it was imported.
        self._on_alarm = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL
        # One loop for all calls: clients that a verifier keeps between them belong to a loop.
        self._loop = asyncio.new_event_loop()

    def judge(self, name: str, items: Sequence[Item]) -> None:
        """Judge ``items`` by the verifier of that name, and send each outcome as it is ready."""
        caller = self._callers[name]
        if caller.signature.mode == "batch":
            self._judge_as_lists(caller, items)
        elif caller.signature.mode == "async":
            with self._guarded():
                self._loop.run_until_complete(self._judge_together(caller, items))
        else:
            for number, payload in items:
                with self._guarded(), _processor_limit() if caller.is_built_in else nullcontext():
                    outcome = self._timed(partial(self._call, caller, payload))
                self._send(number, outcome)

    def _call(self, caller: Caller, payload: bytes) -> tuple[bool, float]:
        return read_result(self._awaited(caller.call(pickle.loads(payload))))

    def _awaited(self, result: Any) -> Any:
        # A decorator can hide that a function is asynchronous.
        return self._loop.run_until_complete(_settle(result)) if inspect.isawaitable(result) else result

    async def _judge_together(self, caller: Caller, items: Sequence[Item]) -> None:
        await asyncio.gather(*(self._judge_async(caller, *item) for item in items))

    async def _judge_async(self, caller: Caller, number: int, payload: bytes) -> None:
        try:
            outcome = await asyncio.wait_for(_attempt_async(caller, payload, self._deadline_s), self._deadline_s)
        except asyncio.TimeoutError:
            outcome = False, 0.0, late_error(self._deadline_s)
        except asyncio.CancelledError as error:
            outcome = False, 0.0, describe(error)
        self._send(number, outcome)

    def _judge_as_lists(self, caller: Caller, items: Sequence[Item]) -> None:
        results: list[Any] = []

        def call() -> tuple[bool, float]:
            returned = self._awaited(caller.call_batch([pickle.loads(payload) for _, payload in items]))
            results.extend(_one_for_each(returned, len(items)))
            return True, 0.0

        with self._guarded():
            outcome = self._timed(call)
            outcomes = [_attempt(partial(read_result, result)) for result in results]
        if outcome[2] is None:
            for (number, _), single in zip(items, outcomes, strict=True):
                self._send(number, single)
        else:
            self._send(items[0][0] if len(items) == 1 else WHOLE_BATCH, outcome)

    def _timed(self, call: Callable[[], tuple[bool, float]]) -> Outcome:
        start = time.monotonic()
        outcome = _attempt(call)
        # The trainer may look a moment late. Whether a verdict is late is decided here.
        return outcome if time.monotonic() - start <= self._deadline_s else (False, 0.0, late_error(self._deadline_s))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """End this process if its trainer cannot, and undo changes that a verifier made to the process.

        The trainer enforces the deadline. If the trainer has been killed, this alarm ends the verification; its default
        action cannot be delayed by Python code.
        """
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, self._deadline_s + GRACE_S)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.fchdir(self._home)

    def _send(self, number: int, outcome: Outcome) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # a verifier forked and its child returned here; only one of them may answer
        self._connection.send_bytes(json.dumps([number, *outcome]).encode())


@contextmanager
def _processor_limit() -> Iterator[None]:
    """Let the kernel end this process by SIGXCPU after one to two more seconds of processor time: it counts whole ones.

    A deadline would have to leave time for a machine that is busy; this limit does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(time.process_time()) + MAX_PROCESSOR_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


async def _settle(result: Any) -> Any:
    return await result


async def _attempt_async(caller: Caller, payload: bytes, deadline_s: float) -> Outcome:
    start = time.monotonic()
    try:
        is_correct, reward = read_result(await caller.call(pickle.loads(payload)))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 (a verifier is foreign code: reported)
        return False, 0.0, describe(error)
    # A verifier that does not await blocks the loop, and with it the timer.
    is_late = time.monotonic() - start > deadline_s
    return (False, 0.0, late_error(deadline_s)) if is_late else (is_correct, reward, None)


def _attempt(call: Callable[[], tuple[bool, float]]) -> Outcome:
    try:
        return *call(), None
    except BaseException as error:  # noqa: BLE001 (a verifier is foreign code, and some raise BaseException: reported)
        return False, 0.0, describe(error)


def _one_for_each(returned: Any, count: int) -> list[Any]:
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        raise TypeError(f"the verifier returned {shown(returned)}: must be a list with a result for each response")
    results = list(returned)
    if len(results) != count:
        found = f"{counted(len(results), 'result')} for {counted(count, 'response')}"
        raise ValueError(f"the verifier returned {found}: must be one for each")
    return results
