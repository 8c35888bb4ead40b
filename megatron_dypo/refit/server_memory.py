"""The memory that servers release while the trainer needs it. Only the global leader uses this."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline

logger = logging.getLogger(__name__)


class ServerMemory:
    """Tracks which servers have released their memory."""

    def __init__(self) -> None:
        self._released: set[str] = set()

    def release(self, control: SGLangControl, timeout_s: float) -> None:
        """Make all servers release their memory. A server that refuses keeps it, with a warning."""
        urls = set(control.urls) - self._released
        # A busy server would crash when it releases its memory; a paused one does not.
        for path, body in (("/pause_generation", {"mode": "retract"}), ("/release_memory_occupation", {})):
            for error in control.attempt([(path, body)], timeout_s, tuple(urls)):
                logger.warning("a server keeps its memory: %s", error)
                urls -= set(error.urls)
        self._released |= urls

    def resume(self, control: SGLangControl, deadline: Deadline) -> None:
        """Make the servers that released their memory allocate it again. Other servers would crash on this call."""
        for url in self._released & set(control.urls):
            control.resume_memory(url, deadline)
            self._released.discard(url)

    def forget(self, urls: Iterable[str]) -> None:
        """Note that these servers were restarted and have all their memory."""
        self._released -= set(urls)
