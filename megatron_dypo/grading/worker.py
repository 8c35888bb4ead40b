"""What runs in a verifier process: import one function, then judge the pairs that come.

A process of its own program, not a ``multiprocessing`` child: that would import the trainer's main module, and with
it torch and Megatron, again at each start.
"""

from __future__ import annotations

import importlib
import math
import numbers
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Outcome = tuple[bool, float, str | None]
"""is_correct, reward, error: the fields of a Verdict."""

_GRACE_S = 5.0
_ROUNDING = 1e-9
_MAX_ERROR_CHARACTERS = 500


def serve(descriptor: int, import_path: str, deadline_s: float) -> None:
    """Answer batches of (response, answer) on a connection, one :data:`Outcome` for each pair as it is ready.

    Sends None when the function is imported, or the reason why it cannot be.
    """
    # A preemption signal or Ctrl-C is the trainer's business: it closes the connection, and that ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # The trainer blocks these for its children too; what a verifier starts must be able to end.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
    connection = Connection(descriptor)
    try:
        function = load_function(import_path)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    try:
        while True:
            for response, answer in connection.recv():
                # The trainer enforces the deadline. This alarm, whose default action no Python code can hold up,
                # ends a verification whose trainer has been killed.
                signal.setitimer(signal.ITIMER_REAL, deadline_s + _GRACE_S)
                outcome = judge(function, response, answer)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send(outcome)
    except (EOFError, ConnectionError):
        return


def load_function(import_path: str) -> Callable[[str, str], Any]:
    """Import ``pkg.module:function``. Raises ValueError naming the part that is wrong."""
    module_name, _, name = import_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"module {module_name} has no function {name!r}")
    return function


def judge(function: Callable[[str, str], Any], response: str, answer: str) -> Outcome:
    """Call the verifier on one pair; whatever it raises becomes an error outcome."""
    try:
        is_correct, reward = read_result(function(response, answer))
    except BaseException as error:  # noqa: BLE001 (a verifier is foreign code, and some raise BaseException: reported)
        return False, 0.0, f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS]
    return is_correct, reward, None


def read_result(result: Any) -> tuple[bool, float]:
    """(is_correct, reward) of what a verifier returned.

    A bool is both. A number is the reward, and correct from 1 up (within 1e-9). A dict has ``is_correct`` (a bool)
    and may have ``reward``, for a shaped reward that leaves correctness alone. Raises TypeError for anything else,
    ValueError for a reward that is not finite.
    """
    if isinstance(result, dict):
        is_correct = result.get("is_correct")
        if not isinstance(is_correct, bool | np.bool_):
            raise TypeError(f"the verifier returned {result!r}: is_correct must be a bool")
        reward = result.get("reward", float(is_correct))
    elif isinstance(result, bool | np.bool_):
        is_correct, reward = result, float(result)
    elif isinstance(result, numbers.Real):
        is_correct, reward = float(result) >= 1 - _ROUNDING, result
    else:
        raise TypeError(f"the verifier returned {result!r}: must be a bool, a number or a dict")
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise ValueError(f"the verifier returned {result!r}: the reward must be a finite number")
    return bool(is_correct), float(reward)
