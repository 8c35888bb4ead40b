"""Which SGLang servers take part in refits and serve rollouts, and which are fenced; the same on every rank.

A fenced server gets no requests and no refits. It rejoins by a full refit, once it answers again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.refit.control import Answer, Deadline, ServerError, SGLangControl
from megatron_dypo.refit.model_checks import check_server

logger = logging.getLogger(__name__)

# A server that hangs costs every refit the first, one that answers has the second to come to rest.
_KNOCK_S = 2.0
_REST_S = 10.0

# What it had been asked before it was fenced ends here; unpaused first, since a paused server says that it is unwell.
# The last call passes through the scheduler, so that its answer shows that one is alive too.
_REST: tuple[tuple[str, Answer | None], ...] = (
    ("/continue_generation", {}),
    ("/health", None),
    ("/pause_generation", {"mode": "abort"}),
    ("/flush_cache", {}),
)


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """What a refit cost."""

    version: int
    seconds: float
    """Wall-clock time of the whole refit, the servers' pause included."""
    pause_seconds: float
    """From the first pause to the time when all servers went on."""
    bytes: int
    """Bytes that left the trainer: to every server (p2p, local), or once for all servers (broadcast, disk)."""
    fenced: int
    """Servers fenced by this refit."""
    rejoined: int
    retries: int
    """Attempts after the first."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the one who started the servers knows of them; the default knows nothing."""

    take_lost: Callable[[], Mapping[str, str]] = dict
    """URL → why, of the servers that ended since the last call, whether or not they run again."""
    may_return: Callable[[], bool] = lambda: False
    """Whether a server that does not answer may do so by itself after a while, being started again."""


class Servers:
    """The servers of a run by URL: serving or fenced. Every change is logged on one rank."""

    def __init__(self, urls: Sequence[str], *, logs: bool) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._reasons: dict[str, str] = {}
        self._logs = logs
        self.num_fenced = 0
        self.num_rejoined = 0

    @property
    def serving(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(url for url in self._urls if url not in self._reasons)

    @property
    def fenced(self) -> tuple[str, ...]:
        return tuple(url for url in self._urls if url in self._reasons)

    @property
    def reasons(self) -> str:
        """Why servers are fenced, each reason once."""
        return "; ".join(dict.fromkeys(self._reasons.values()))

    def fence(self, reasons: Mapping[str, str]) -> None:
        """Leave servers out until they rejoin; ``reasons``: URL → why. One that is fenced already stays so, uncounted."""
        for url, reason in reasons.items():
            if url in self._reasons:
                continue
            self._reasons[url] = reason
            self.num_fenced += 1
            if self._logs:
                logger.warning("server %s is fenced, it gets no requests: %s", url, reason)

    def rejoin(self, urls: Iterable[str], version: int) -> None:
        """Take servers in again, for the refit of ``version``."""
        for url in urls:
            del self._reasons[url]
            self.num_rejoined += 1
            if self._logs:
                logger.info("server %s answers again and rejoins by the refit of version %d", url, version)


def answering(control: SGLangControl, urls: Sequence[str], arch: Architecture) -> tuple[str, ...]:
    """Those of some fenced servers that are well and serve ``arch``; they are left paused, without requests."""
    unwell = _errors(control, (("/model_info", None),), _KNOCK_S, urls)
    unwell |= _errors(control, _REST, _REST_S, [url for url in urls if url not in unwell])
    back = []
    for url in urls:
        try:
            if url in unwell:
                raise unwell[url]
            (info,) = control.describe(Deadline(_KNOCK_S), [url])
            check_server(info, arch)
        except ServerError as error:
            logger.debug("server %s stays fenced: %s", url, error)
        else:
            back.append(url)
    return tuple(back)


def _errors(
    control: SGLangControl, steps: Sequence[tuple[str, Answer | None]], timeout_s: float, urls: Sequence[str]
) -> dict[str, ServerError]:
    """URL → an error, of the servers that gave one."""
    return {url: error for error in control.attempt(steps, timeout_s, urls) for url in error.urls}
