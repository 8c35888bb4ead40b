"""The ranks for which the others wait in each update, and a warning of those that are regularly slow."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_dypo.config.words import first_of

log = logging.getLogger("megatron_dypo")

SLOW_FACTOR = 1.2
"""A rank is slow in a step if it takes this many times as long for its work as the median rank (of two, the faster)."""
WINDOW = 10
"""Recent steps that are looked at."""
NEEDED = 8
"""Slow steps among them that make a rank regularly slow."""
RECOVERED = 2
"""Slow steps among them at which it keeps up again."""
_SHOWN = 8


@dataclass
class SlowRanks:
    """The slow ranks of the last steps. All ranks see the same; the first one warns."""

    _recent: deque[frozenset[int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _named: set[int] = field(default_factory=set)

    def look(self, busy_s: Sequence[float], work: Sequence[float]) -> dict[str, float]:
        """Take one step's times and FLOPs by rank; return its metrics. One rank waits for none, and has no metrics."""
        if len(busy_s) < 2 or not all(work):
            return {}
        paces = [seconds / flops for seconds, flops in zip(busy_s, work, strict=True)]
        usual = statistics.median_low(paces)
        self._recent.append(frozenset(rank for rank, pace in enumerate(paces) if pace > SLOW_FACTOR * usual))
        longest, median = max(busy_s), statistics.median_low(busy_s)
        return {
            "perf/slowest_rank": float(busy_s.index(longest)),
            "perf/slowest_rank_excess": longest / median - 1 if median else 0.0,
            "perf/rank_wait_ratio": 1 - statistics.fmean(busy_s) / longest if longest else 0.0,
        }

    def news(self) -> tuple[list[int], list[int]]:
        """Return the ranks that have become regularly slow since the last call, and those that keep up again."""
        counts: dict[int, int] = {}
        for slow in self._recent:
            for rank in slow:
                counts[rank] = counts.get(rank, 0) + 1
        became = sorted(rank for rank, count in counts.items() if count >= NEEDED and rank not in self._named)
        ended = sorted(rank for rank in self._named if counts.get(rank, 0) <= RECOVERED)
        self._named = (self._named | set(became)) - set(ended)
        return became, ended

    def warn(self, step: int, metrics: dict[str, float], name_of: Callable[[int], str]) -> None:
        """Log the news after a step. ``name_of`` returns rank and host in words."""
        became, ended = self.news()
        if became:
            wait = metrics.get("perf/rank_wait_ratio", 0.0)
            log.warning(
                "slow: step %d: %s took over %g times as long as the median rank for the same work in %d of the last "
                "%d steps; the mean rank waits for %.0f%% of forward and backward",
                *(step, _names(became, name_of), SLOW_FACTOR, NEEDED, WINDOW, 100 * wait),
            )
        if ended:
            log.warning("slow: step %d: %s keeps up again", step, _names(ended, name_of))


def _names(ranks: Sequence[int], name_of: Callable[[int], str]) -> str:
    # A name is read from a file, so only those that are shown are looked up.
    return first_of([name_of(rank) if place < _SHOWN else "" for place, rank in enumerate(ranks)], _SHOWN)
