"""The servers of a run: those that serve rollouts and take part in refits, and those that are fenced.

A fenced server gets no requests and no weights. It rejoins by a full refit, once it answers again. All ranks agree.
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
"""How long each refit waits for a fenced server that hangs."""
_DRAIN_TIMEOUT_S = 10.0
"""How long a fenced server that answers may take to end its requests."""

# Ends the requests from before the server was fenced. It is unpaused first, since a paused server says that it is
# unwell. The last call passes through the scheduler, so that its answer shows that the scheduler is alive too.
_DRAIN: tuple[tuple[str, Answer | None], ...] = (
    ("/continue_generation", {}),
    ("/health", None),
    ("/pause_generation", {"mode": "abort"}),
    ("/flush_cache", {}),
)


@dataclass(kw_only=True)
class RefitUnderWay:
    """One refit under way; the same on every rank."""

    version: int
    deadline: Deadline
    start: float = field(default_factory=time.monotonic)
    paused_at: float = math.inf
    """Infinite until servers are paused."""
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """The cost of a refit."""

    version: int
    seconds: float
    """Wall-clock time of the whole refit, the servers' pause included."""
    pause_seconds: float
    """From the first pause until all servers generate again."""
    bytes: int
    """Bytes that left the trainer: to every server (p2p, local), or once for all servers (broadcast, disk)."""
    fenced: int
    """Servers fenced by this refit."""
    rejoined: int
    retries: int
    """Attempts after the first."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Asks whoever started the servers about them; the default knows nothing."""

    take_lost: Callable[[], Mapping[str, str]] = dict
    """Returns URL → reason of the servers that ended since the last call, whether or not they run again."""
    may_return: Callable[[], bool] = lambda: False
    """Returns whether a server that does not answer may be started again, and answer after a while."""


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
        """URLs of the servers that are not fenced, in the order in which they were given."""
        return tuple(url for url in self._urls if url not in self._reasons)

    @property
    def fenced(self) -> tuple[str, ...]:
        """URLs of the fenced servers, in the order in which they were given."""
        return tuple(url for url in self._urls if url in self._reasons)

    @property
    def reasons(self) -> str:
        """The reasons for which servers are fenced, each once."""
        return "; ".join(dict.fromkeys(self._reasons.values()))

    def fence(self, reasons: Mapping[str, str]) -> None:
        """Leave servers out until they rejoin. A server that is fenced already stays fenced, and is not counted again.

        Args:
            reasons: URL → reason.
        """
        for url, reason in reasons.items():
            if url in self._reasons:
                continue
            self._reasons[url] = reason
            self.num_fenced += 1
            if self._logs:
                logger.warning("server %s is fenced, it gets no requests: %s", url, reason)

    def rejoin(self, urls: Iterable[str], version: int) -> None:
        """Take servers back, for the refit of ``version``."""
        for url in urls:
            del self._reasons[url]
            self.num_rejoined += 1
            if self._logs:
                logger.info("server %s answers again and rejoins by the refit of version %d", url, version)


def recovered_servers(control: SGLangControl, urls: Sequence[str], arch: Architecture) -> tuple[str, ...]:
    """Return the fenced servers among ``urls`` that are well and serve ``arch``; they stay paused, without requests."""
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
    """Make calls on servers; returns URL → an error, of the servers that failed."""
    return {url: error for error in control.attempt(steps, timeout_s, urls) for url in error.urls}
