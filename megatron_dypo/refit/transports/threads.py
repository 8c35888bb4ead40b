"""One thread per link, so that a slow peer does not block the other links."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from megatron_dypo.parallel import streams

T = TypeVar("T")
_LOOK_EVERY_S = 0.5
"""Seconds between two looks for what is lost."""


def run_concurrently(
    actions: Sequence[Callable[[], None]], lost: Callable[[int], BaseException | None] = lambda index: None
) -> list[BaseException | None]:
    """Run the actions concurrently under ``inference_mode``, on this thread's GPU, until all have ended or are lost.

    Each has a stream of its own, which begins after this thread's work so far. Each must end with its stream's work
    done.

    Args:
        lost: returns the reason why an action will never end, or None. It is asked about those that still run. A lost
            one goes on in its thread, and what it does is of no use to anybody.

    Return, for each action, the exception that it raised or the reason why it is lost, or None. If its thread cannot
    start, that is the exception.
    """
    errors: list[BaseException | None] = [None] * len(actions)  # the variables of their frames are dropped
    lanes = [streams.Lane() for _ in actions]

    def run(index: int) -> None:
        try:
            with lanes[index].entered(), torch.inference_mode():
                actions[index]()
        except BaseException as error:  # noqa: BLE001, raised or reported by the caller, who knows whose link it was
            drop_frames(error)
            errors[index] = error

    running: dict[int, threading.Thread] = {}
    for index in range(len(actions)):
        thread = threading.Thread(target=run, args=(index,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system allows no more threads
            errors[index] = error
        else:
            running[index] = thread
    reasons: dict[int, BaseException] = {}
    while running:
        end = time.monotonic() + _LOOK_EVERY_S
        for thread in running.values():
            thread.join(max(0.0, end - time.monotonic()))
        running = {index: thread for index, thread in running.items() if thread.is_alive()}
        reasons |= {index: reason for index in running if (reason := lost(index)) is not None}
        running = {index: thread for index, thread in running.items() if index not in reasons}
    return [reasons.get(index, error) for index, error in enumerate(errors)]


def run_unless_lost(action: Callable[[], T], lost: Callable[[], BaseException | None]) -> T:
    """Run one action as :func:`run_concurrently` does, and return its result.

    Raises:
        BaseException: what it raised, or the reason why it is lost.
    """
    made: list[T] = []
    (error,) = run_concurrently([lambda: made.append(action())], lambda _: lost())
    if error is not None:
        raise error
    return made[0]


def drop_frames(error: BaseException | None) -> None:
    """Clear the variables in the frames of an error and of the errors that led to it.

    The variables refer to stores and groups, whose sockets close only with the last reference. A peer that waits on the
    other side is freed only then, so no reference may stay alive while somebody handles the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
