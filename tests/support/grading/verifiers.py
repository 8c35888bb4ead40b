"""Verifiers for the tests. Most of them misbehave: the response tells each what to do."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def obedient(response: str, answer: str) -> object:
    """Do what ``response`` says, or else compare it with ``answer``."""
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
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "leave":
        os._exit(7)
    return response == answer


def strange(response: str, answer: Any) -> object:
    """Change the state of the process, or answer in a way that nobody expects."""
    if response == "fork":
        os.fork()  # both processes return
    if response == "fork and die":
        if os.fork() == 0:
            threading.Event().wait()
        os._exit(9)
    if response == "move":
        os.chdir("/")
    if response == "where":
        return {"is_correct": Path.cwd() != Path("/")}
    if response == "print":
        for _ in range(200):
            print("x" * 2**19)
    if response == "large result":
        return "y" * 10**8
    if response == "bad repr":
        return _Unprintable()
    if response == "bad message":
        raise _UnprintableError
    if response == "surrogate":
        raise ValueError("\ud83d\nsecond line \x1b[31m")
    if response == "late":
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            os.sched_yield()
        return True
    if response == "close":
        os.closerange(3, 64)
    if response == "alarm":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    if response == "alarm state":
        return signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    if response == "terminate children":
        return _end_of_terminated_children() == [-signal.SIGTERM] * 2
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    return response == answer or response == str(len(answer))


def _end_of_terminated_children() -> list[int]:
    """Terminate a child started by ``exec`` and one started by ``fork``; return their exit codes."""
    started = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    started.terminate()
    forked = os.fork()
    if forked == 0:
        threading.Event().wait()
    os.kill(forked, signal.SIGTERM)
    return [started.wait(), -os.waitpid(forked, 0)[1]]


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no representation")


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def returns(response: str, answer: str) -> object:
    """Return one of the kinds of results."""
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
    """Return the id of the judging process as the reward."""
    return float(os.getpid())


def whole_row(response: str, answer: Any, *, prompt: str, source: str, prompt_id: str, row: Mapping[str, Any]) -> bool:
    """Compare every argument with the values in the answer, which is an object."""
    return answer == {"response": response, "prompt": prompt, "source": source, "id": prompt_id, "row": row}


def source_only(response: str, gold: str, source: str = "") -> bool:
    return response == source


def verl_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> dict[str, Any]:
    """Judge with the parameters of verl's verifiers."""
    is_right = solution_str == ground_truth and extra_info == {"split": data_source}
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": solution_str}


async def asynchronous(response: str, answer: str) -> object:
    if response == "meet":  # passes only if another verifier runs at the same time
        _waiting.append(response)
        while len(_waiting) < 2:
            await asyncio.sleep(0.01)
        return True
    if response == "block":
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            os.sched_yield()
        return True
    if response == "wait":
        await asyncio.sleep(3600)
    return obedient(response, answer)


_waiting: list[str] = []


@functools.lru_cache(maxsize=1)
def hidden_async(response: str, answer: str) -> object:
    """Return a coroutine, although it is not declared as asynchronous."""
    return asynchronous(response, answer)


def batched(responses: list[str], answers: list[str]) -> list[object]:
    """Judge a batch of pairs; the reward is the number of pairs in it."""
    if "too few" in responses:
        return []
    return [
        {"is_correct": obedient(response, answer), "reward": float("nan") if response == "nan" else float(len(answers))}
        for response, answer in zip(responses, answers, strict=True)
    ]


def spin(response: str, answer: str) -> bool:
    """Use as many seconds of processor time as the response says."""
    start = time.process_time()
    while time.process_time() - start < float(response):
        pass
    return True


def hangs_always(response: str, answer: str) -> bool:
    threading.Event().wait()
    return True


def raises_its_response(response: str, answer: str) -> bool:
    raise ValueError(f"cannot read {response}")


def wants_more(response: str, answer: str, threshold: float) -> bool:
    return True


def always_true(response: str, answer: str) -> bool:
    return True


def never_true(response: str, answer: str) -> bool:
    return False


def wants_object(response: str, answer: dict[str, Any]) -> bool:
    return len(answer["tests"]) > 0 and response == "all tests pass"


NOT_A_FUNCTION = 3


def never_judges(response: str, answer: str) -> bool:
    raise KeyError(answer)
