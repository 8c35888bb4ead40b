"""The choice of the server for the next request: the least loaded one that has not failed recently."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence


class NoServerError(Exception):
    """Every server is gone or holds wrong weights."""


class LeastLoaded:
    """Chooses the server with the fewest open requests of this client. A server that failed rests for ``rest_s``
    seconds.

    Without the rest, a failing server that answers every request at once would look idle and get all requests. A server
    that is left out gets none.
    """

    def __init__(self, urls: Sequence[str], *, rest_s: float, clock: Callable[[], float]) -> None:
        if not urls:
            raise ValueError("urls=(): name at least one SGLang server or router")
        self._outstanding = dict.fromkeys(urls, 0)
        self._rests_until = dict.fromkeys(urls, 0.0)
        self._left_out: set[str] = set()
        self._turn = 0
        self._rest_s, self._clock = rest_s, clock

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """Borrow the URL for one request.

        Raises:
            NoServerError: all are left out.
        """
        url = self._choose()
        self._outstanding[url] += 1
        try:
            yield url
        finally:
            self._outstanding[url] -= 1

    def failed(self, url: str) -> None:
        """Let a server rest after a failure."""
        self._rests_until[url] = self._clock() + self._rest_s

    def leave_out(self, url: str) -> bool:
        """Choose this server no more; return False if it was left out before."""
        is_new = url not in self._left_out
        self._left_out.add(url)
        return is_new

    def _choose(self) -> str:
        now = self._clock()
        urls = [url for url in self._outstanding if url not in self._left_out]
        if not urls:
            raise NoServerError(f"no SGLang server is left: {', '.join(self._outstanding)} went")
        awake = [url for url in urls if self._rests_until[url] <= now] or urls
        self._turn += 1  # ties go to the servers in turn
        place_of = {url: place for place, url in enumerate(urls)}
        return min(awake, key=lambda url: (self._outstanding[url], (place_of[url] - self._turn) % len(urls)))
