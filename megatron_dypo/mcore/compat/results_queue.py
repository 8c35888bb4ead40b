"""The queue between Megatron's checkpoint writer and its processes."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dypo.mcore.compat.private_name import PrivateName

RESULTS_QUEUE = PrivateName(
    package="megatron-core",
    module="megatron.core.dist_checkpointing.strategies.filesystem_async",
    name="_results_queue",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/dist_checkpointing/strategies/filesystem_async.py:48",
    oldest="0.12",
)
"""The queue of this process. None: ``_get_write_results_queue`` makes one at its first call."""


def use_results_queue(queue: Any) -> None:
    """Make Megatron's writer use ``queue`` instead of one of its own.

    Megatron's own queue needs one more process for each rank, which imports torch to read the results and waits
    indefinitely after the trainer was killed. A save that returns when everything is written
    (``AsyncRequest.execute_sync``) puts its results into the queue and takes them out in one process, so any queue will
    do.
    """
    RESULTS_QUEUE.get()
    filesystem_async._results_queue = queue
