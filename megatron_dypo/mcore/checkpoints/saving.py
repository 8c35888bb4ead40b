"""A checkpoint that is written while training goes on.

A save has three parts:

1. Collective, in the calling thread: Megatron plans the files, and every tensor is copied into host memory.
2. In a thread of each rank, without collectives: Megatron's processes (since core 0.17 threads) write the copies and
   wait until they are on the disk; then the checksums of the files are taken.
3. Collective, in the calling thread: ``.metadata`` and the manifest are written, and the folder gets its name.

Until the last part the folder has the name ``step_000010.tmp``. If a rank dies before, the checkpoint before counts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.mcore.checkpoints.folder import discard_partial, partial_of
from megatron_dypo.mcore.checkpoints.manifest import FileRecord, record_files
from megatron_dypo.mcore.checkpoints.save_failure import save_failure
from megatron_dypo.mcore.checkpoints.sealing import seal, tensor_files
from megatron_dypo.mcore.compat.results_queue import use_results_queue, write, writer
from megatron_dypo.parallel.collectives import any_rank, gather_world
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.processes.children import forks_end_with_this_thread


def stage(state: dict[str, Any], folder: Path) -> AsyncRequest:
    """Plan the files of a sharded state in ``folder``, and copy its tensors into host memory.

    Collective over the world. Of tensors that several replicas hold, the first replica writes its own.
    """
    use_results_queue(queue.SimpleQueue())
    request: AsyncRequest = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **writer())
    if request.preload_fn is None:
        return request
    rank, buckets, results = request.async_fn_args
    copies = [
        (path, key, (in_bytes, [(item, _copy(tensor, of)) for (item, tensor), (_, of) in zip(new, old, strict=True)]))
        for (path, key, (in_bytes, new)), (_, _, (_, old)) in zip(request.preload_fn(), buckets, strict=True)
    ]
    return request._replace(async_fn_args=(rank, copies, results), preload_fn=None)


def _copy(tensor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a clone if it still has the memory of the tensor that training changes."""
    return tensor.clone() if tensor.data_ptr() == of.data_ptr() else tensor


class PendingSave:
    """A checkpoint whose copies are being written. Every rank has one."""

    def __init__(
        self, final: Path, layout: MeshRank, requests: Sequence[AsyncRequest], publish: Callable[[], object]
    ) -> None:
        """Start to write.

        Args:
            final: the checkpoint's folder once it is whole.
            requests: those of :func:`stage`, in the order in which they were made.
            publish: gives the folder its name; called on the global leader.
        """
        self.final, self._layout, self._requests, self._publish = final, layout, requests, publish
        self._records: Mapping[str, FileRecord] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Return whether all ranks have written their files. Collective over the world."""
        return not any_rank(self._thread.is_alive())

    def finish(self) -> Path:
        """Wait for the files, and publish the checkpoint; return its folder. Collective over the world.

        Raises:
            OSError: the file system is full. Nothing is left of this checkpoint, and older ones are unchanged.
            RuntimeError: a rank could not write its files for another reason.
        """
        self._thread.join()
        try:
            self._raise_together()
            for request in self._requests:
                dist.barrier()
                for finalize in request.finalize_fns:
                    finalize()
            seal(partial_of(self.final), self._layout, gather_world, known=self._records)
            if self._layout.is_global_leader:
                self._publish()
            dist.barrier()
        except (CheckpointException, OSError, RuntimeError) as error:
            if self._layout.is_global_leader:
                discard_partial(self.final)
            if isinstance(error, CheckpointException):
                raise save_failure(error, self.final) from error
            raise
        return self.final

    def _write(self) -> None:
        try:
            with forks_end_with_this_thread():
                for request in self._requests:
                    write(request)
            partial = partial_of(self.final)
            self._records = record_files(partial, tensor_files(partial, self._layout.rank))
        except BaseException as error:  # noqa: BLE001 (it is raised by finish, on all ranks)
            self._error = error
        finally:
            # The copies are as large as the state. Only the results are still needed.
            self._requests = [request._replace(async_fn_args=()) for request in self._requests]

    def _raise_together(self) -> None:
        error = self._error
        own = None if error is None else (getattr(error, "errno", None), f"{type(error).__name__}: {error}")
        for rank, found in enumerate(gather_world(own)):
            if found is not None:
                number, text = found
                message = f"rank {rank} could not write its part of the checkpoint: {text}"
                raise (
                    RuntimeError(f"{self.final}: {message}")
                    if number is None
                    else OSError(number, message, str(self.final))
                )


class Saver:
    """The saves of a run: at most one is pending."""

    def __init__(self) -> None:
        self._pending: PendingSave | None = None
        self._on_publish: Callable[[], object] = lambda: None

    def begin(
        self, make: Callable[[], PendingSave], *, waits: bool, on_publish: Callable[[], object] = lambda: None
    ) -> None:
        """Begin a save, after the one before is finished; with ``waits`` finish it too. Collective over the world.

        Args:
            on_publish: called on every rank once the checkpoint is published.
        """
        self.finish()
        self._pending, self._on_publish = make(), on_publish
        if waits:
            self.finish()

    def poll(self) -> None:
        """Finish the pending save if all ranks have written their files. Collective over the world."""
        if self._pending is not None and self._pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Finish the pending save, if there is one. Collective over the world. Raises what it raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish()
            self._on_publish()
