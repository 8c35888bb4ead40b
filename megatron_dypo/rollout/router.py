"""A router (``sglang-router``) in front of the servers. The trainer tells it which servers may get requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.server.probe import request_json

NO_SERVER = ("X-SMG-Error-Code", "no_available_workers")
"""Header in the answer of a router that has no server."""
_LOOK_EVERY_S = 0.05
"""Seconds between two looks at the router's servers: it queues a change and does not announce when it is done."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Router:
    """A router, and the API key that it and its servers require."""

    url: str
    api_key: str | None
    deadline_s: float = 30.0
    """Time for the router to start and to know its servers."""

    def use_servers(self, servers: Iterable[str]) -> None:
        """Make the router send requests only to these servers, which must be up; return when it does.

        A router that is too slow is only logged, since rollouts of wrong weights are dropped anyway. ``/workers`` is
        the interface of sglang-router 0.3, which queues changes.
        """
        wanted, asked = set(servers), set[str]()
        deadline = running_time() + self.deadline_s
        while (known := self._workers()) is None or known.keys() != wanted:
            if running_time() > deadline:
                has = "does not answer" if known is None else f"has {sorted(known)}"
                _log.warning("router %s %s after %g s, not %s", self.url, has, self.deadline_s, sorted(wanted))
                return
            if known is not None:
                changes = (known.keys() ^ wanted) - asked
                for url in sorted(changes):
                    self._add(url) if url in wanted else self._remove(url, known[url])
                asked |= changes
            time.sleep(_LOOK_EVERY_S)

    def _workers(self) -> dict[str, str] | None:
        """Return URL → id of its servers; None if it does not answer, or does not answer like sglang-router."""
        status, payload = request_json("GET", f"{self.url}/workers", self.api_key)
        workers = payload.get("workers") if status == 200 and isinstance(payload, dict) else None
        if not isinstance(workers, list) or not all(isinstance(worker, dict) for worker in workers):
            return None
        known = {worker.get("url"): worker.get("id") for worker in workers}
        return known if all(isinstance(word, str) for word in (*known.keys(), *known.values())) else None

    def _add(self, url: str) -> None:
        body = {"url": url, "api_key": self.api_key}
        status, _ = request_json("POST", f"{self.url}/workers", self.api_key, body)
        self._log_answer(f"add {url}", status)

    def _remove(self, url: str, worker_id: str) -> None:
        status, _ = request_json("DELETE", f"{self.url}/workers/{worker_id}", self.api_key)
        self._log_answer(f"remove {url}", status)

    def _log_answer(self, request: str, status: int | None) -> None:
        level = logging.INFO if status in (200, 202) else logging.WARNING
        _log.log(level, "router %s: %s: %s", self.url, request, status or "no answer")
