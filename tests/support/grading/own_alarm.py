"""A verifier with a time limit of its own, whose handler is set once, when the module is imported."""

import signal
import threading
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("my own limit")


signal.signal(signal.SIGALRM, _stop)


def limited(response: str, answer: str) -> bool:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    if response == "hang":
        threading.Event().wait()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return response == answer
