"""A moment by which something has to be over. Standard library only: servers use it too."""

from __future__ import annotations

import time


class Deadline:
    """A moment by which a refit, or one attempt at it, has to be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds that are left, above 0.

        Raises:
            TimeoutError: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the {self.seconds:g} s that it may take have passed")
        return left

    def split(self) -> Deadline:
        """Return a deadline at half of the time that is left, so that the other half remains after it.

        It has passed if this one has.
        """
        return Deadline(max(self._end - time.monotonic(), 0.0) / 2)
