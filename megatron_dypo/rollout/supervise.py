"""Servers of the run that are started again when they die."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from megatron_dypo.rollout.process import ServerDiedError, ServerProcess

_POLL_S = 0.2

_log = logging.getLogger(__name__)


class Supervised:
    """One server that runs, started again when it dies, up to ``restarts`` times.

    A server that came back holds the weights of its model folder, not those of the last push.
    """

    def __init__(
        self,
        process: ServerProcess,
        start: Callable[[], None],
        is_healthy: Callable[[], bool],
        *,
        restarts: int,
        deadline_s: float,
    ) -> None:
        """``start`` starts ``process`` again; one that is not healthy after ``deadline_s`` is stopped, as if it had died."""
        self.process = process
        self._start, self._is_healthy = start, is_healthy
        self._restarts, self._deadline_s = restarts, deadline_s
        self._num_starts = 0
        self._started_at = 0.0
        self._is_up = True
        self._death: ServerDiedError | None = None
        self._untold: str | None = None
        self._lock = threading.Lock()

    @property
    def given_up(self) -> ServerDiedError | None:
        """How it ended, if it is dead and stays so."""
        return self._death

    def take_death(self) -> str | None:
        """How the server last ended, if it did since the last call; it may run again by now."""
        with self._lock:
            untold, self._untold = self._untold, None
        return untold

    def poll(self) -> None:
        """Look after the server: start it again if it has ended."""
        with self._lock:
            if self._death is not None:
                return
            try:
                self.process.check()
            except ServerDiedError as error:
                self._restart(error)
                return
            if not self._is_up:
                self._await_health()

    def _restart(self, death: ServerDiedError) -> None:
        self._untold = str(death).splitlines()[0]
        if self._num_starts == self._restarts:
            self._death = death
            _log.error("%s\nrollout.servers.restarts=%d: it is not started again", death, self._restarts)
            return
        self._num_starts += 1
        self._is_up, self._started_at = False, time.monotonic()
        _log.warning("%s\nstarting it again (%d of %d times)", death, self._num_starts, self._restarts)
        self._start()

    def _await_health(self) -> None:
        if self._is_healthy():
            self._is_up = True
            _log.info("%s (%s) runs again; it serves after the next push", self.process.name, self.process.url)
        elif time.monotonic() > self._started_at + self._deadline_s:
            _log.warning("%s is not healthy after %g s; stopping it", self.process.name, self._deadline_s)
            self.process.stop()


class Supervisor:
    """Looks after servers from a thread of its own, until :meth:`stop`."""

    def __init__(self, servers: Sequence[Supervised]) -> None:
        self.servers = tuple(servers)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervise servers", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Look after all servers now."""
        for server in self.servers:
            server.poll()

    def check(self) -> None:
        """Raises:
        ServerDiedError: no server is left, and none will be started again.
        """
        ends = [server.given_up for server in self.servers]
        if all(ends):
            raise ServerDiedError("no SGLang server is left: " + "\n".join(map(str, ends)))

    def stop(self) -> None:
        """No server is started again once this returns."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            self.poll()
