"""Lengths of responses, given their mean and limit. Pure arithmetic.

Nothing else is known of the lengths, so they have the distribution of largest entropy on [0, limit]: an exponential
that is cut off at the limit, and that rises toward it if the mean is above half of the limit.
"""

from __future__ import annotations

import bisect
import functools
import math

_QUANTILES = 256


def survival(mean: float, limit: float, tokens: float) -> float:
    """Return the share of responses that are longer than ``tokens``."""
    if tokens >= limit:
        return 0.0
    tilt = _tilt(min(max(mean / limit, 0.01), 0.99))
    if abs(tilt) < 1e-6:
        return 1 - tokens / limit
    return math.expm1(tilt * (1 - tokens / limit)) / math.expm1(tilt)


@functools.lru_cache(maxsize=4096)
def _tilt(share: float) -> float:
    """Return x with 1/x − 1/(eˣ − 1) = ``share``, the mean of the distribution on [0, 1] with a density of e⁻ˣᵗ."""

    def mean(x: float) -> float:
        return 0.5 - x / 12 if abs(x) < 1e-4 else 1 / x - 1 / math.expm1(x)

    low, high = -500.0, 500.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > share else (low, middle)
    return (low + high) / 2


@functools.lru_cache(maxsize=4096)
def sequences_per_microbatch(prompt: float, mean: float, limit: float, budget: float) -> float:
    """Return how many sequences fill a microbatch of ``budget`` tokens on average.

    Sequences of typical lengths are packed, the longest first, each into the first microbatch that has room. One that
    is longer than the budget is alone.
    """
    if mean >= limit:
        return max(1.0, budget // (prompt + mean))
    lengths = sorted((prompt + _quantile(mean, limit, (i + 0.5) / _QUANTILES) for i in range(_QUANTILES)), reverse=True)
    rooms: list[float] = []  # ascending
    for length in lengths:
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else max(budget, length)
        bisect.insort(rooms, room - length)
    return _QUANTILES / len(rooms)


def _quantile(mean: float, limit: float, share: float) -> float:
    """Return the length that ``share`` of the responses do not exceed."""
    tilt = _tilt(min(max(mean / limit, 0.01), 0.99))
    if abs(tilt) < 1e-6:
        return share * limit
    return -limit * math.log1p(share * math.expm1(-tilt)) / tilt
