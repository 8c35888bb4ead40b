"""Deadlines. This module needs only the standard library, since servers import it too."""

from __future__ import annotations

from megatron_dypo.processes.running_time import running_time


class Deadline:
    """The moment by which a refit, or one attempt at it, must end, on the clock of :func:`.running_time`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = running_time() + seconds

    def remaining(self) -> float:
        """Return the seconds left, above 0.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left = self.left()
        if not left:
            raise TimeoutError(f"the time limit of {self.seconds:g} s has passed")
        return left

    def left(self) -> float:
        """Return the seconds left; 0 if the deadline has passed."""
        return max(self._end - running_time(), 0.0)

    def split(self) -> Deadline:
        """Return a deadline after half of the time left, so that the other half remains after it.

        If this deadline has passed, so has the new one.
        """
        return Deadline(self.left() / 2)
