"""Threads of one process that work on its GPU at the same time, and the end of a communication between GPUs."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dypo.parallel.device import on_gpu

T = TypeVar("T")
_POLL_S = 1e-4
"""Seconds between two looks at work on a GPU."""


def on_this_gpu(action: Callable[[], T]) -> Callable[[], T]:
    """Return ``action`` for another thread, where it works on the GPU of this one. A new thread starts on GPU 0."""
    if not on_gpu():
        return action
    gpu = torch.cuda.current_device()

    def run() -> T:
        torch.cuda.set_device(gpu)
        return action()

    return run


class Lane:
    """A stream for one thread of several that work at once, so that none waits for the work of another.

    The stream begins after the work that the maker of the lane has queued so far. It does nothing on a CPU.
    """

    def __init__(self) -> None:
        self._stream = None
        if on_gpu():
            self._gpu = torch.cuda.current_device()
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work on the lane's GPU and stream inside the block."""
        if self._stream is None:
            yield
            return
        torch.cuda.set_device(self._gpu)
        with torch.cuda.stream(self._stream):
            yield


def finish(work: dist.Work, seconds: float) -> None:
    """Block this thread until a communication has ended, also on the GPU.

    NCCL's own ``wait`` has no deadline: it lets the current stream wait. With ``CUDA_DEVICE_MAX_CONNECTIONS=1`` such a
    stream holds up all others. So the stream waits only for work that says that it is complete. Work that failed says
    so too, but its end never comes on the stream.

    Raises:
        TimeoutError: it has not ended in time (GPU).
        RuntimeError: it failed, or has not ended in time (gloo).
    """
    if not on_gpu():
        work.wait(datetime.timedelta(seconds=seconds))
        return
    end = time.monotonic() + seconds
    _poll(work.is_completed, end)
    work.wait()
    event = torch.cuda.Event()
    event.record()
    _poll(event.query, end)


def _poll(has_ended: Callable[[], bool], end: float) -> None:
    while not has_ended():
        if time.monotonic() > end:
            raise TimeoutError("the communication did not end before the deadline")
        time.sleep(_POLL_S)
