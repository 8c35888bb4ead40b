"""The queue between Megatron's checkpoint writer and its processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import uuid
from multiprocessing.managers import SyncManager

from megatron_dypo.mcore.compat.results_queue import use_results_queue
from megatron_dypo.processes.children import blocked, end_with_parent


@functools.cache
def start_results_queue() -> SyncManager:
    """Give Megatron's writer a queue whose process ends with this one.

    Megatron's own queue (dist_checkpointing/strategies/filesystem_async.py:51 of 0.16.1) is in a process that waits
    indefinitely after the trainer was killed. Its address is a path below TMPDIR, which may be longer than the 107
    bytes that a Unix socket allows. This queue's address is abstract (unix(7)) and needs no path.
    """
    address = f"\0megatron-dypo-{os.getpid()}-{uuid.uuid4().hex}" if sys.platform == "linux" else None
    manager = SyncManager(address=address, ctx=multiprocessing.get_context("spawn"))
    with blocked((signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)):  # they are for the rank
        manager.start(end_with_parent)
    use_results_queue(manager.Queue())
    return manager
