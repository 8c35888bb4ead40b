"""The attempts for one group: the cost of a failed one, the pause before the next, and when to give up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_dypo.config.words import counted
from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.ask import AskError, BusyError, LostServerError, OwnLackError, RefusedError
from megatron_dypo.types import DropReason

_MAX_BACKOFF_S = 30.0
_FIRST_LACK_S = 0.05
_MAX_LACK_S = 1.0


class GroupDroppedError(Exception):
    """There will be no group: it stayed incomplete, or a server refuses its prompt."""

    def __init__(self, message: str, reason: DropReason = DropReason.INCOMPLETE) -> None:
        super().__init__(message)
        self.reason = reason
        """``REFUSED``: a server refuses it for good. ``INCOMPLETE``: all retries failed, or the deadline passed."""


@dataclass(kw_only=True)
class Attempts:
    """The attempts for one group, from its first to its last."""

    retries: int
    """Number of attempts after the first."""
    deadline_s: float
    """Seconds for all attempts together."""
    backoff_s: float
    """Pause before the first retry; it doubles each time, up to 30 s."""
    ends_at: float
    """End of ``deadline_s`` on the clock of :func:`.running_time`."""
    wanted: str = "complete group"
    """Name of the requested thing, for messages."""
    failures: int = 0
    """Attempts that count against ``retries``."""
    waits: int = 0
    """Attempts that a busy server did not take."""
    lacks: int = 0
    """Attempts that this host could not even begin."""
    last_failure: str = "none, no answer came"

    def left_s(self) -> float:
        """Return the seconds until the deadline.

        Raises:
            GroupDroppedError: it has passed.
        """
        left_s = self.ends_at - running_time()
        if left_s <= 0:
            limit = f"request_deadline_s={self.deadline_s:g}"
            raise GroupDroppedError(f"no {self.wanted} after {limit}; last failure: {self.last_failure}")
        return left_s

    def pause_after(self, error: AskError) -> float:
        """Note a failed attempt, and return the seconds to wait before the next.

        A lost server costs no attempt: the next one goes elsewhere at once. Nor does a lack of this host's: other
        requests end and leave room. Nor does a server that takes no request now, even for minutes: the next attempt
        waits as long as it asks for, and longer each time.

        Raises:
            GroupDroppedError: there is no next attempt.
        """
        if isinstance(error, RefusedError):
            raise GroupDroppedError(str(error), DropReason.REFUSED) from error
        left_s = self.left_s()
        self.last_failure = str(error)
        return min(self._pause_s(error), left_s)

    def _pause_s(self, error: AskError) -> float:
        if isinstance(error, LostServerError):
            return 0.0
        if isinstance(error, BusyError):
            self.waits += 1
            return max(error.retry_after_s, self._doubled(self.waits)) * random.uniform(1.0, 1.1)
        if isinstance(error, OwnLackError):
            self.lacks = min(self.lacks + 1, 30)
            return min(_FIRST_LACK_S * 2.0 ** (self.lacks - 1), _MAX_LACK_S) * random.uniform(0.5, 1.0)
        self.failures += 1
        if self.failures > self.retries:
            raise GroupDroppedError(f"{counted(self.failures, 'attempt')} failed, the last: {error}") from error
        return self._doubled(self.failures) * random.uniform(0.5, 1.0)

    def _doubled(self, number: int) -> float:
        return min(self.backoff_s * 2.0 ** min(number - 1, 30), _MAX_BACKOFF_S)
