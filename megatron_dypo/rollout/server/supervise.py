"""Supervision of the run's servers: a server that dies is started again."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence

from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.server.probe import HEALTH_EVERY_S
from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess

_log = logging.getLogger(__name__)
_STEADY_S = 1800.0
"""Seconds after which a server that has served all the time may be started again as often as at first."""


class Supervised:
    """One running server. It is started again when it dies, up to ``restarts`` times in a row.

    Half an hour of serving ends a row, so that a run of weeks outlives a death every other day. A restarted server
    holds the weights of its model folder, not those of the last refit.
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
        """Supervise ``process``; ``start`` starts it again.

        A server that is not healthy ``deadline_s`` after its start is stopped and counts as dead.
        """
        self.process = process
        self._start, self._is_healthy = start, is_healthy
        self._restarts, self._deadline_s = restarts, deadline_s
        self._num_starts = self._num_in_row = 0
        self._started_at = 0.0
        self._serves_since = running_time()
        self._given_up: str | None = None
        self._untold: str | None = None
        self._is_over = threading.Event()
        self._lock = threading.Lock()

    @property
    def given_up(self) -> str | None:
        """How the server ended, with the end of its log, if it is not started again; else None."""
        return self._given_up

    def take_death(self) -> str | None:
        """Return how the server last ended, if it ended since the last call. It may run again by now."""
        with self._lock:
            untold, self._untold = self._untold, None
        return untold

    def notice(self) -> None:
        """Start the server again if it has ended. Returns at once; any thread may call it."""
        with self._lock:
            ending = None if self._given_up or self._is_over.is_set() else self.process.ending()
            if ending is not None:
                self._untold = ending
                self._restart(ending)

    def look_after(self) -> None:
        """Start the server again each time it ends, until it is given up or :meth:`leave_alone` is called."""
        num_seen = 0
        while not self._is_over.is_set() and self._given_up is None:
            self.process.wait()
            self.notice()
            if self._num_starts > num_seen:
                num_seen = self._num_starts
                self._await_health()

    def leave_alone(self) -> None:
        """Do not start the server again from now on."""
        with self._lock:
            self._is_over.set()

    def _await_health(self) -> None:
        """Wait until a restarted server is up or has ended; stop one that takes too long."""
        while not self._is_over.wait(HEALTH_EVERY_S):
            is_healthy = self._is_healthy()
            if self.process.ending() is not None:
                return
            if is_healthy:
                self._serves_since = running_time()
                _log.info("%s (%s) runs again; it serves after the next refit", self.process.name, self.process.url)
                return
            if running_time() > self._started_at + self._deadline_s:
                _log.warning("%s is not healthy after %g s; stopping it", self.process.name, self._deadline_s)
                self.process.stop()
                return

    def _restart(self, ending: str) -> None:
        if running_time() > self._serves_since + _STEADY_S:
            self._num_in_row = 0
        if self._num_in_row == self._restarts:
            try:
                self.process.check()
            except ServerDiedError as error:
                self._given_up = str(error)
            _log.error("%s\nrollout.servers.max_restarts=%d: it is not started again", self._given_up, self._restarts)
            return
        self._num_starts += 1
        self._num_in_row += 1
        self._started_at, self._serves_since = running_time(), math.inf
        _log.warning("%s; starting it again (%d of %d times)", ending, self._num_in_row, self._restarts)
        try:
            self._start()
        except OSError as error:  # no process or descriptor left: count it as another death
            _log.warning("%s could not be started: %s", self.process.name, error)


class Supervisor:
    """Supervises servers until :meth:`stop`. For each server one thread waits for its end."""

    def __init__(self, servers: Sequence[Supervised], *, needs_all: bool = False) -> None:
        """Start supervising. With ``needs_all``, losing one server counts as losing all."""
        self.servers = tuple(servers)
        self._needs_all = needs_all
        self._error: BaseException | None = None
        self._has_news = threading.Event()
        for server in self.servers:
            name = f"supervise {server.process.name}"
            threading.Thread(target=self._run, args=(server,), name=name, daemon=True).start()

    def check(self) -> None:
        """Notice every death now.

        Raises:
            ServerDiedError: no server is left (or, with ``needs_all``, one is gone), and none will be started again.
            RuntimeError: a supervising thread has failed, which is a bug.
        """
        if self._error is not None:
            raise RuntimeError("the thread that looks after the servers has ended") from self._error
        for server in self.servers:
            server.notice()
        ends = [server.given_up for server in self.servers]
        if self._needs_all and any(ends):
            raise ServerDiedError(next(filter(None, ends)))
        if all(ends):
            raise ServerDiedError("no SGLang server is left: " + "\n".join(filter(None, ends)))

    def wait_for_loss(self) -> None:
        """Wait until :meth:`check` raises, and raise its error."""
        while True:
            self.check()
            self._has_news.wait()
            self._has_news.clear()

    def stop(self) -> None:
        """Stop supervising. No server is started again once this returns."""
        for server in self.servers:
            server.leave_alone()

    def _run(self, server: Supervised) -> None:
        try:
            server.look_after()
        except BaseException as error:  # noqa: BLE001, raised by `check`, in the thread that asks
            self._error = error
        self._has_news.set()
