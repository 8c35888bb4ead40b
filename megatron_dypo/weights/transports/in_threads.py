"""Links are driven by a thread each: one that waits then holds up no other, in whatever order the ends get ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch


def run_all(actions: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """Run all actions at once, without autograd; what each raised, when all have ended."""
    errors: list[BaseException | None] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            with torch.inference_mode():
                actions[index]()
        except Exception as error:  # noqa: BLE001, raised or reported by the caller, who knows whose link it was
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
