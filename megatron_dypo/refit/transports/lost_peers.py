"""Who is lost, by the store of a connection: links that wait ask it.

A link alone does not always learn that its other end is gone. NCCL does not notice the end of a process at all, and TCP
not that of a host. The store lives in the global leader, which knows whether the call of each server has ended.

A client of a store serves one call at a time, so these look through one that nothing waits on.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from megatron_dypo.refit.control_message import GO, ended_key
from megatron_dypo.refit.transports.links import LinkError

GRACE_S = 5.0
"""Seconds after the end of a server's call in which its links may still end by themselves."""


class LostServers:
    """A trainer rank's view of the servers' calls."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._seen: dict[tuple[int, int], float] = {}

    def error(self, refit: int, server: int) -> Exception | None:
        """Return the error of a link that still waits although the server's call has ended, or None."""
        try:
            if not self._has_ended(refit, server):
                return None
        except RuntimeError as error:
            return RuntimeError(f"the global leader dropped the connection: {error}")
        seen = self._seen.setdefault((refit, server), time.monotonic())
        if time.monotonic() - seen < GRACE_S:
            return None
        return LinkError("its call has ended, and it takes nothing more")

    def _has_ended(self, refit: int, server: int) -> bool:
        key = ended_key(server)
        return self._store.check([key]) and int(self._store.get(key)) >= refit


def trainer_error(store: dist.Store) -> LinkError | None:
    """Return the error of a link that waits for a trainer whose store is gone, or None."""
    try:
        store.check([GO])
    except RuntimeError as error:
        return LinkError(f"the trainer dropped the connection: {error}")
    return None
