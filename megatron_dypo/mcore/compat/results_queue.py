"""The queue into which Megatron's checkpoint writer puts its results."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_dypo.mcore.compat.core_version import CORE
from megatron_dypo.mcore.compat.private_name import PrivateName

RESULTS_QUEUE = PrivateName(
    package="megatron-core",
    module="megatron.core.dist_checkpointing.strategies.filesystem_async",
    name="_results_queue",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/dist_checkpointing/strategies/filesystem_async.py:48",
    oldest="0.12",
)
"""The queue of this process. None: ``_get_write_results_queue``, since core 0.17 ``get_write_results_queue``, makes one
at its first call."""


def use_results_queue(queue: Any) -> None:
    """Make Megatron's writer use ``queue`` instead of one of its own.

    Megatron's own queue needs one more process for each rank, which imports torch to read the results and waits
    indefinitely after the trainer was killed. A save that returns when everything is written
    (``AsyncRequest.execute_sync``) puts its results into the queue and takes them out in one process, so any queue will
    do.
    """
    RESULTS_QUEUE.get()
    filesystem_async._results_queue = queue


def writer() -> dict[str, str]:
    """Return the argument of ``dist_checkpointing.save`` for the writer of this file.

    Since core 0.17 it takes that of nvidia-resiliency-ext where that is installed, which has a queue of its own.
    """
    return {"async_strategy": "mcore"} if CORE >= (0, 17) else {}


def write(request: AsyncRequest) -> None:
    """Write the files of a request. The results, or the first error, are then in its queue.

    Since core 0.17 threads write, and of an error only its class reaches the queue, or none does
    (strategies/filesystem_async.py:285 of 0.17.1). Here the error itself gets there, as with the processes of 0.16: its
    text tells whether the file system is full.
    """
    if request.async_fn is None:
        return
    if CORE < (0, 17):
        request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)
        return
    upstream, errors = FileSystemWriterAsync.write_preloaded_data, list[Exception]()

    @functools.wraps(upstream)
    def write_preloaded_data(*args: Any, **kwargs: Any) -> Any:
        output = upstream(*args, **kwargs)
        if isinstance(output[1], Exception):
            errors.append(output[1])
        return output

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)
    try:
        request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)
    except AssertionError:  # it asserts that an output is no error
        if not errors:
            raise
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(upstream)
    if errors:
        results = request.async_fn_args[2]
        while not results.empty():
            results.get()
        results.put(errors[0])
