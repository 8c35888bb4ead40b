"""A moment by which something has to be over. Standard library only: it is used inside the servers too."""

from __future__ import annotations

import time


class Deadline:
    """A moment by which a whole push has to be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds that are left, above 0.

        Raises:
            TimeoutError: none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"deadline_s={self.seconds:g} passed")
        return left
