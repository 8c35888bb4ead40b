"""A router (``sglang-router``) that requests go through, told which of its servers may get them."""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dypo.rollout.probe import post_status

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Router:
    """A router and the key that it asks for."""

    url: str
    api_key: str | None

    def move(self, before: Iterable[str], after: Iterable[str]) -> None:
        """Take out the servers that are in ``before`` alone, and in those that are in ``after`` alone.

        A refusal goes to the log only: rollouts of other weights than they should be of are dropped wherever they come
        from. ``POST /remove_worker?url=…`` and ``/add_worker?url=…`` are those of sglang-router 0.3.
        """
        old, new = set(before), set(after)
        for route, urls in (("remove_worker", old - new), ("add_worker", new - old)):
            for url in sorted(urls):
                status = post_status(f"{self.url}/{route}?url={urllib.parse.quote(url, safe='')}", self.api_key)
                level = logging.INFO if status in (200, 202) else logging.WARNING
                _log.log(level, "router %s: %s %s: %s", self.url, route, url, status or "no answer")
