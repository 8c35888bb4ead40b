"""Requests to stop, and how a process of a run receives them.

The first SIGUSR1 (which Slurm sends before a time limit), SIGTERM, SIGINT (Ctrl-C) or SIGHUP asks the run to finish its
step, save a checkpoint and end. A second SIGINT or SIGTERM ends it at once.

The signals are blocked in every thread, and one thread waits for them, so that a main thread in a collective does not
delay the answer. They are blocked rather than handled because Slurm signals every process of a job step, and Ctrl-C
every process of the terminal. Processes that a rank starts (verifiers, servers, the writer of checkpoints) inherit the
mask; a handler would be lost in ``exec``. Servers and verifiers unblock the signals that they need.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_dypo.ending import Cause
from megatron_dypo.processes import children

PREEMPTED_STATUS = Cause.STOPPED.status
"""Exit status of a run that stopped on request and wrote a checkpoint."""

_TWICE = {signal.SIGINT, signal.SIGTERM}
ECHO_S = 0.5
"""Seconds in which a second SIGTERM counts as the first: Slurm sends it to each process, and the script passes it
on."""


FIRST_ANSWER = "%s: the run finishes its step, saves a checkpoint and ends; a second SIGINT or SIGTERM ends it at once"


def end_of_insistence(number: signal.Signals) -> tuple[Cause, str]:
    """Return cause and message of a run that a second signal ended."""
    cause = Cause.INTERRUPTED if number == signal.SIGINT else Cause.TERMINATED
    return cause, f"ended at once by a second {number.name}; what was done since the last checkpoint is lost"


class StopFlag:
    """A flag that stays set, and wakes waiting threads and event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._callbacks: list[Callable[[], object]] = []

    def set(self) -> None:
        """Set the flag; call each waiting callback once, in this thread."""
        with self._lock:
            self._is_set = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._is_set

    @contextlib.contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call ``callback`` once if the flag is set, or when it is set within the block, in the thread that sets it."""
        with self._lock:
            is_late = self._is_set
            if not is_late:
                self._callbacks.append(callback)
        if is_late:
            callback()
        try:
            yield
        finally:
            with self._lock, contextlib.suppress(ValueError):  # it was called
                self._callbacks.remove(callback)


STOP = StopFlag()
"""Set when this process is asked to stop, for waits that must then end."""


@dataclass
class _State:
    """Requests to this process. The state is module-level, since signals belong to the process."""

    held: frozenset[signal.Signals] = frozenset()
    first: signal.Signals | None = None
    """The signal that asked to stop."""
    is_loop_looking: bool = False
    """Whether :func:`is_requested` was called; then the loop ends the run in an orderly way."""
    heard: dict[signal.Signals, float] = field(default_factory=dict)
    answers: Answers | None = None


_state = _State()


def hold_requests() -> None:
    """Keep requests pending, so that they do not kill the process. Call this before any thread starts.

    A SIGHUP that was set to be ignored (``nohup``) stays ignored.
    """
    held = [s for s in children.STOP if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, children.STOP)  # torchrun would handle an ignored one
    for number in held:
        # An ignored signal (`trap "" USR1` in the shell) may not become pending while it is blocked.
        signal.signal(number, signal.SIG_DFL)
    _state.held = frozenset(held)


def ignore_requests() -> None:
    """Ignore SIGUSR1, which is meant for a trainer. For servers and routers, which Slurm signals too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def is_requested() -> bool:
    """Return whether this process was asked to stop since :func:`hold_requests`.

    The loop calls this before each step. From the first call on, the loop ends the run. An earlier request ends the
    process from the listening thread, since there is nothing to save during the start.
    """
    _state.is_loop_looking = True
    return _state.first is not None or bool(_state.held & signal.sigpending())


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of a process to signals. The listening thread calls them."""

    on_request: Callable[[signal.Signals], None]
    """Answers the first request."""
    on_early_request: Callable[[signal.Signals], None]
    """Answers a request that came before the loop looks at requests, or before the listener started."""
    on_insistence: Callable[[signal.Signals], None]
    """Answers a second SIGINT or SIGTERM: end at once."""
    on_parent: Callable[[], None] | None = None
    """Answers SIGTERM from the parent, or the end of the parent: end at once. None: treat it as a request."""


def listen(answers: Answers) -> None:
    """Answer signals with ``answers`` from now on, in a separate thread."""
    is_first = _state.answers is None
    _state.answers = answers
    if is_first:
        threading.Thread(target=_listen, args=(os.getppid(),), name="signals", daemon=True).start()


def _listen(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(_state.held)
        number, answers = signal.Signals(received.si_signo), _state.answers
        assert answers is not None
        if answers.on_parent and number == signal.SIGTERM and (received.si_pid == parent or os.getppid() != parent):
            answers.on_parent()
            continue
        now, before = time.monotonic(), _state.heard.get(number)
        _state.heard[number] = now
        if before is not None and number in _TWICE and (number == signal.SIGINT or now - before > ECHO_S):
            answers.on_insistence(number)
        elif _state.first is None:
            _state.first = number
            STOP.set()
            answers.on_request(number)
            if not _state.is_loop_looking:
                answers.on_early_request(number)
