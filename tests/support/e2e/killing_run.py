"""``megatron-dypo train`` in which servers are killed at given moments: python -m tests.support.e2e.killing_run CONFIG
MOMENTS.

MOMENTS is a JSON list of [event, server, delay in seconds]. A moment comes at the next ``event`` that concerns its
server: ``generate``, or a control route such as ``/pause_generation``; the server is killed that much later, at 0
before the request goes out. One moment comes after the other, each when its server takes part again: a refit waits for
that.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.launch.start import launch, train_rank
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.refitter import Refitter
from megatron_dypo.rollout import http_client
from megatron_dypo.rollout.server.probe import http_status
from tests.support.e2e.refitting_ranks import kill_server

log = logging.getLogger("megatron_dypo.killing_run")


class Killer:
    """A killer of one run's servers, in the process of rank 0."""

    def __init__(self, moments: list[tuple[str, int, float]]) -> None:
        self._moments = moments
        self.urls: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._under_way: threading.Thread | None = None
        self.serving: tuple[str, ...] = ()

    def watch(self, urls: tuple[str, ...]) -> None:
        self.urls = self.urls or urls

    def notice(self, event: str, url: str) -> None:
        """Note that a request of this kind is about to go to a server; kill the server if it is time."""
        with self._lock:
            if not self._moments:
                return
            expected, index, delay_s = self._moments[0]
            if event != expected or url != self.urls[index] or url not in self.serving:
                return
            self._moments.pop(0)
            self.serving = ()  # ignore requests until a refit has gathered the servers again
        log.info("killing %s %.3f s after %s", url, delay_s, event)
        if delay_s == 0:
            kill_server(url)
            return
        self._under_way = threading.Timer(delay_s, kill_server, [url])
        self._under_way.start()

    def await_all(self, deadline_s: float = 600.0) -> None:
        """Wait until every server answers."""
        if self._under_way is not None:
            self._under_way.join()
        deadline = time.monotonic() + deadline_s
        while any(http_status(f"{url}/health", None) != 200 for url in self.urls):
            assert time.monotonic() < deadline, "a server did not come back"
            time.sleep(0.2)


def install(killer: Killer) -> None:
    """Make the client, the refitter and its control notify the killer."""
    ask, call, refit = vars(http_client)["ask"], SGLangControl.call, Refitter.refit

    async def noticed_ask(session: Any, url: str, body: bytes, **options: Any) -> Any:
        killer.notice("generate", url.removesuffix("/generate"))
        return await ask(session, url, body, **options)

    async def noticed_call(self: Any, method: str, url: str, path: str, *rest: Any) -> Any:
        killer.notice(path, url)
        return await call(self, method, url, path, *rest)

    def waiting_refit(self: Any, version: int) -> Any:
        killer.watch(self.serving)
        killer.await_all()
        killer.serving = killer.urls if version else ()
        return refit(self, version)

    vars(http_client)["ask"] = noticed_ask
    SGLangControl.call = noticed_call  # type: ignore[method-assign,assignment]
    Refitter.refit = waiting_refit  # type: ignore[method-assign]


if __name__ == "__main__":
    import os

    path = Path(sys.argv[1])
    if os.environ.get("RANK", "0") == "0":
        install(Killer([tuple(moment) for moment in json.loads(sys.argv[2])]))
    launch(load_config(path), ["train", str(path)], train_rank)
