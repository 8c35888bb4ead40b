"""A stand-in for CUDA and NCCL on a machine without a GPU: it records what runs where.

Tensors lie on the CPU. As in CUDA, each thread has a current GPU, 0 at first, and a current stream.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.parallel import device
from megatron_dypo.parallel.environment import NO_WATCHDOG


@dataclass(frozen=True, kw_only=True)
class Record:
    """One call: what, in which thread, on which GPU and stream."""

    verb: str
    thread: int
    gpu: int
    stream: object


@dataclass(kw_only=True)
class RecordingCuda:
    """The stand-in's state. ``torch.cuda``'s functions that this package uses are replaced by its methods."""

    records: list[Record] = field(default_factory=list)
    num_gpus: int = 8
    capability: tuple[int, int] = (9, 0)
    _here: threading.local = field(default_factory=threading.local)

    def note(self, verb: str, *, gpu: int | None = None, stream: object = None) -> None:
        where = self.current_device() if gpu is None else gpu
        self.records.append(
            Record(verb=verb, thread=threading.get_ident(), gpu=where, stream=stream or self.current_stream())
        )

    def of(self, verb: str) -> list[Record]:
        """Return the records of one kind of call."""
        return [record for record in self.records if record.verb == verb]

    def current_device(self) -> int:
        gpu: int = getattr(self._here, "gpu", 0)
        return gpu

    def set_device(self, gpu: int) -> None:
        self._here.gpu = gpu

    def current_stream(self) -> Any:
        return getattr(self._here, "stream", None) or f"default stream of GPU {self.current_device()}"

    def synchronize(self) -> None:
        self.note("synchronize")

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Replace CUDA until the test ends."""
        cuda = self

        class Stream:
            def __init__(self) -> None:
                self.gpu = cuda.current_device()
                cuda.note("make a stream")

            def wait_stream(self, other: object) -> None:
                cuda.note("stream waits", gpu=self.gpu, stream=self)

            def synchronize(self) -> None:
                cuda.note("synchronize", gpu=self.gpu, stream=self)

        class DefaultStream(Stream):
            def __init__(self) -> None:
                self.gpu = cuda.current_device()

        class Event:
            def record(self) -> None:
                cuda.note("record an event")

            def query(self) -> bool:
                return True

        @contextlib.contextmanager
        def stream(one: Stream) -> Iterator[None]:
            before = getattr(cuda._here, "stream", None)
            cuda._here.stream = one
            try:
                yield
            finally:
                cuda._here.stream = before

        def made(make: Any) -> Any:
            def on_cpu(*args: Any, **kwargs: Any) -> Any:
                place = kwargs.get("device")
                if place is not None and torch.device(place).type == "cuda":
                    cuda.note("allocate", gpu=torch.device(place).index)
                    kwargs["device"] = "cpu"
                kwargs.pop("pin_memory", None)
                return make(*args, **kwargs)

            return on_cpu

        copy = torch.Tensor.copy_

        def copied(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            cuda.note("copy that the CPU does not wait for" if kwargs.get("non_blocking") else "copy")
            return copy(tensor, *args, **kwargs)

        patch.setattr(device, "device_kind", lambda: "cuda")
        for name in ("current_device", "set_device", "synchronize"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "current_stream", lambda: getattr(cuda._here, "stream", None) or DefaultStream())
        patch.setattr(torch.cuda, "device_count", lambda: self.num_gpus)
        patch.setattr(torch.cuda, "get_device_capability", lambda _=None: self.capability)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        for name in ("empty", "zeros"):
            patch.setattr(torch, name, made(getattr(torch, name)))
        patch.setattr(torch.Tensor, "copy_", copied)


class NcclWork:
    """An operation as NCCL's: ``wait`` only queues a wait on the current stream, without a deadline."""

    def __init__(self, cuda: RecordingCuda, work: dist.Work) -> None:
        self._cuda, self._done = cuda, threading.Event()
        threading.Thread(target=self._finish, args=(work,), daemon=True).start()

    def _finish(self, work: dist.Work) -> None:
        with contextlib.suppress(RuntimeError):  # a lost peer: the operation never ends
            work.wait()
            self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._cuda.note("wait for done work" if self._done.is_set() else "wait for work under way")


class NcclGroup:
    """A group as NCCL's, over gloo: its errors end the process unless the environment says otherwise."""

    def __init__(self, cuda: RecordingCuda, store: dist.Store, rank: int, size: int, options: Any) -> None:
        self._cuda = cuda
        # First, as NCCL's does: once both ends have met, the other one's thread restores the environment of both.
        self.ends_process = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3") != "0"
        self.max_ctas = options.config.max_ctas
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=20))
        self.aborted = False
        cuda.note("make a group")

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> NcclWork:
        self._cuda.note(f"send {tensors[0].numel()}")
        return NcclWork(self._cuda, self._group.send(tensors, peer, tag))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> NcclWork:
        self._cuda.note(f"receive {tensors[0].numel()}")
        return NcclWork(self._cuda, self._group.recv(tensors, peer, tag))

    def abort(self) -> None:
        self.aborted = True


class _Options:
    def __init__(self) -> None:
        self._timeout = datetime.timedelta(0)
        self.config = type("Config", (), {"max_ctas": None})()


def stand_in_for_nccl(cuda: RecordingCuda, patch: pytest.MonkeyPatch) -> list[NcclGroup]:
    """Replace ``ProcessGroupNCCL``; return the list that each new group joins."""
    made: list[NcclGroup] = []
    for name in NO_WATCHDOG:
        patch.delenv(name, raising=False)  # both ends share this process's environment: the test restores it

    class Group(NcclGroup):
        Options = _Options

        def __init__(self, store: dist.Store, rank: int, size: int, options: Any) -> None:
            super().__init__(cuda, store, rank, size, options)
            made.append(self)

    patch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    return made
