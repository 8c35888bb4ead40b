"""One thread per link, so that a slow peer does not block the other links."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

import torch

from megatron_dypo.parallel import device


def run_concurrently(actions: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """Run the actions concurrently under ``inference_mode``, on this thread's GPU.

    Returns, per action, the exception that it raised or None, when all have ended. An action whose thread cannot start
    has raised the reason for that.
    """
    errors: list[BaseException | None] = [None] * len(actions)  # without the variables of their frames
    gpu = torch.accelerator.current_device_index() if device.on_gpu() else None

    def run(index: int) -> None:
        try:
            if gpu is not None:
                torch.accelerator.set_device_index(gpu)  # a new thread starts on the first GPU
            with torch.inference_mode():
                actions[index]()
        except BaseException as error:  # noqa: BLE001, raised or reported by the caller, who knows whose link it was
            drop_frames(error)
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


def drop_frames(error: BaseException | None) -> None:
    """Clear the variables of all frames that an error, and the errors that led to it, came through.

    The variables refer to stores and groups. Their sockets close with the last reference only, and that is what frees
    a peer that waits on the other side: no reference must last for as long as somebody handles the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
