"""Servers of the run that are started again when they die."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess

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
        self._given_up: str | None = None
        self._untold: str | None = None
        self._lock = threading.Lock()

    @property
    def given_up(self) -> str | None:
        """How it ended, with the end of its log, if it is dead and stays so."""
        return self._given_up

    def take_death(self) -> str | None:
        """How the server last ended, if it did since the last call; it may run again by now."""
        with self._lock:
            untold, self._untold = self._untold, None
        return untold

    def notice(self) -> None:
        """Start the server again if it has ended. Returns at once; may be called from any thread."""
        with self._lock:
            ending = None if self._given_up else self.process.ending()
            if ending is not None:
                self._untold = ending
                self._restart(ending)

    def await_health(self) -> None:
        """See whether a server that was started again is up; to be called now and then, from one thread."""
        if self._is_up:
            return
        start = self._num_starts
        is_healthy = self._is_healthy()
        with self._lock:
            if start != self._num_starts:
                return  # meanwhile it died once more
            if is_healthy:
                self._is_up = True
                _log.info("%s (%s) runs again; it serves after the next push", self.process.name, self.process.url)
            elif time.monotonic() > self._started_at + self._deadline_s:
                _log.warning("%s is not healthy after %g s; stopping it", self.process.name, self._deadline_s)
                self.process.stop()

    def _restart(self, ending: str) -> None:
        if self._num_starts == self._restarts:
            try:
                self.process.check()
            except ServerDiedError as error:
                self._given_up = str(error)
            _log.error("%s\nrollout.servers.max_restarts=%d: it is not started again", self._given_up, self._restarts)
            return
        self._num_starts += 1
        self._is_up, self._started_at = False, time.monotonic()
        _log.warning("%s; starting it again (%d of %d times)", ending, self._num_starts, self._restarts)
        try:
            self._start()
        except OSError as error:  # no process or descriptor left: as if it had died once more
            _log.warning("%s could not be started: %s", self.process.name, error)


class Supervisor:
    """Looks after servers from a thread of its own, until :meth:`stop`."""

    def __init__(self, servers: Sequence[Supervised]) -> None:
        self.servers = tuple(servers)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervise servers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Notice every death now.

        Raises:
            ServerDiedError: no server is left, and none will be started again.
            RuntimeError: nobody looks after the servers any more, for a reason that is an error of ours.
        """
        if self._error is not None:
            raise RuntimeError("the thread that looks after the servers has ended") from self._error
        for server in self.servers:
            server.notice()
        ends = [server.given_up for server in self.servers]
        if all(ends):
            raise ServerDiedError("no SGLang server is left: " + "\n".join(filter(None, ends)))

    def stop(self) -> None:
        """No server is started again once this returns."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_POLL_S):
                for server in self.servers:
                    server.notice()
                    server.await_health()
        except BaseException as error:  # noqa: BLE001, raised by `check`, in the thread that asks
            self._error = error
