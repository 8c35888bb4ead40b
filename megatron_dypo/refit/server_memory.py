"""The memory that servers release while the trainer needs it; used on the global leader."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline

logger = logging.getLogger(__name__)


class ServerMemory:
    """Which servers have released their memory."""

    def __init__(self) -> None:
        self._released: set[str] = set()

    def release(self, control: SGLangControl, timeout_s: float) -> None:
        """Have all servers release their memory; a server that refuses keeps it, with a warning."""
        urls = set(control.urls) - self._released
        # A server that is busy would die of the release; one that was paused before does not.
        for path, body in (("/pause_generation", {"mode": "retract"}), ("/release_memory_occupation", {})):
            for error in control.attempt([(path, body)], timeout_s, tuple(urls)):
                logger.warning("a server keeps its memory: %s", error)
                urls -= set(error.urls)
        self._released |= urls

    def resume(self, control: SGLangControl, deadline: Deadline) -> None:
        """Have the servers take their memory back, those alone that released it: the others would die of this."""
        for url in self._released & set(control.urls):
            control.resume_memory(url, deadline)
            self._released.discard(url)

    def forget(self, urls: Iterable[str]) -> None:
        """Take note that these servers were started again, with all their memory."""
        self._released -= set(urls)
