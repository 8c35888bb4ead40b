"""Links are driven by a thread each: one that waits then holds up no other, in whatever order the ends get ready."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

import torch


def run_all(actions: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """Run all actions at once, without autograd; return what each raised, when all have ended.

    An action whose thread cannot start has raised what kept it from that.
    """
    errors: list[BaseException | None] = [None] * len(actions)  # without what their frames held

    def run(index: int) -> None:
        try:
            with torch.inference_mode():
                actions[index]()
        except BaseException as error:  # noqa: BLE001, raised or reported by the caller, who knows whose link it was
            let_go(error)
            errors[index] = error

    started = []
    for index in range(len(actions)):
        thread = threading.Thread(target=run, args=(index,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, by a limit of the system
            errors[index] = error
        else:
            started.append(thread)
    for thread in started:
        thread.join()
    return errors


def let_go(error: BaseException | None) -> None:
    """Clear the variables of the frames that an error, and those that led to it, came through.

    They refer to stores and groups, whose sockets close, and so free whoever waits on the other side, with the last
    reference only: none must be left for as long as somebody handles the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
