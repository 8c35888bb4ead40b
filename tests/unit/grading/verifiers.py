"""Verifiers that misbehave, for the tests: each is told by the response what to do."""

from __future__ import annotations

import os
import signal
import sys
import threading

import numpy as np


def obedient(response: str, answer: str) -> object:
    """Does what ``response`` says, else compares it with ``answer``."""
    if response == "hang":
        threading.Event().wait()
    if response == "hang in C":
        return len(str(9 ** (9**9))) == 0
    if response == "raise":
        raise KeyError("no such unit")
    if response == "raise BaseException":
        raise GeneratorExit("not even an Exception")
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "leave":
        os._exit(7)
    return response == answer


def returns(response: str, answer: str) -> object:
    """Returns one of the kinds of results."""
    return {
        "true": True,
        "numpy": np.bool_(True),
        "one": 1,
        "almost": np.float32(1.0),
        "half": 0.5,
        "more": 1.5,
        "shaped": {"is_correct": True, "reward": 0.25},
        "wrong but tidy": {"is_correct": False, "reward": 0.1},
        "bare": {"is_correct": True},
        "nan": float("nan"),
        "text": "yes",
        "number in dict": {"is_correct": 0.7},
        "none": None,
    }[response]


def pid(response: str, answer: str) -> float:
    """The reward is the process that judged."""
    return float(os.getpid())


NOT_A_FUNCTION = 3
