"""The servers of a run: serving ones, which take part in refits, and fenced ones.

A fenced server gets no requests and no weights. Once it answers again, it rejoins by a full refit. All ranks have the
same lists.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.refit.answers import Answer, ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.model_checks import check_server

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0
"""Longest wait of each refit for a fenced server that hangs."""
_DRAIN_TIMEOUT_S = 10.0
"""Longest time for a fenced server that answers to end its requests."""

# Calls that end the requests from before the server was fenced. It is unpaused first, since a paused server reports
# that it is unhealthy. The last call passes through the scheduler, so its answer shows that the scheduler is alive too.
_DRAIN: tuple[tuple[str, Answer | None], ...] = (
    ("/continue_generation", {}),
    ("/health", None),
    ("/pause_generation", {"mode": "abort"}),
    ("/flush_cache", {}),
)


@dataclass(kw_only=True)
class RefitUnderWay:
    """One running refit; the same on every rank."""

    version: int
    deadline: Deadline
    start: float = field(default_factory=time.monotonic)
    paused_at: float = math.inf
    """Time of the first pause; infinite until then."""
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """The cost of a refit."""

    version: int
    seconds: float
    """Wall-clock time of the whole refit, the servers' pause included."""
    pause_seconds: float
    """Time from the first pause until all servers generate again."""
    bytes: int
    """Bytes that the trainer sent: to each server (p2p, local), or once for all servers (broadcast, disk)."""
    fenced: int
    """Number of servers that this refit fenced."""
    rejoined: int
    retries: int
    """Attempts after the first."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Reports of the owner of the servers about servers that died. The default reports nothing."""

    take_lost: Callable[[], Mapping[str, str]] = dict
    """Returns URL → reason for the servers that ended since the last call, whether or not they run again."""
    may_return: Callable[[], bool] = lambda: False
    """Returns whether a server that does not answer may be restarted and answer later."""
    is_stopping: Callable[[], bool] = lambda: False
    """Returns whether the run was asked to stop. Then no refit waits for a server to come back."""


class Servers:
    """The servers of a run by URL, serving or fenced."""

    def __init__(self, urls: Sequence[str], *, logs: bool) -> None:
        """``logs``: whether this rank logs every change."""
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._reasons: dict[str, str] = {}
        self._logs = logs
        self.num_fenced = 0
        self.num_rejoined = 0

    @property
    def serving(self) -> tuple[str, ...]:
        """Return the URLs of the servers that are not fenced, in the order in which they were given."""
        return tuple(url for url in self._urls if url not in self._reasons)

    @property
    def fenced(self) -> tuple[str, ...]:
        """Return the URLs of the fenced servers, in the order in which they were given."""
        return tuple(url for url in self._urls if url in self._reasons)

    @property
    def reasons(self) -> str:
        """Return the reasons why servers are fenced, each once."""
        return "; ".join(dict.fromkeys(self._reasons.values()))

    def fence(self, reasons: Mapping[str, str]) -> None:
        """Leave servers out until they rejoin. A server that is already fenced stays so and is not counted again.

        Args:
            reasons: URL → reason.
        """
        for url, reason in reasons.items():
            if url in self._reasons:
                continue
            self._reasons[url] = reason
            self.num_fenced += 1
            if self._logs:
                logger.warning("server %s is fenced and gets no requests: %s", url, reason)

    def rejoin(self, urls: Iterable[str], version: int) -> None:
        """Take servers back, for the refit of ``version``."""
        for url in urls:
            del self._reasons[url]
            self.num_rejoined += 1
            if self._logs:
                logger.info("server %s answers again and rejoins by the refit of version %d", url, version)


def recovered_servers(control: SGLangControl, urls: Sequence[str], arch: Architecture) -> tuple[str, ...]:
    """Return the fenced servers among ``urls`` that are healthy and serve ``arch``. They stay paused, without
    requests."""
    unwell = _errors(control, (("/model_info", None),), _PROBE_TIMEOUT_S, urls)
    unwell |= _errors(control, _DRAIN, _DRAIN_TIMEOUT_S, [url for url in urls if url not in unwell])
    back = []
    for url in urls:
        try:
            if url in unwell:
                raise unwell[url]
            (info,) = control.describe(Deadline(_PROBE_TIMEOUT_S), [url])
            check_server(info, arch)
        except ServerError as error:
            logger.debug("server %s stays fenced: %s", url, error)
        else:
            back.append(url)
    return tuple(back)


def _errors(
    control: SGLangControl, steps: Sequence[tuple[str, Answer | None]], timeout_s: float, urls: Sequence[str]
) -> dict[str, ServerError]:
    """Make calls on servers; return URL → error for the servers that failed."""
    return {url: error for error in control.attempt(steps, timeout_s, urls) for url in error.urls}
