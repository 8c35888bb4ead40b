"""Find the constants of the time model that explain measured seconds. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_dypo.planning.constants import Constants

LARGEST_CHANGE = 20.0
"""No constant is fitted beyond this many times its guess, or this fraction of it."""


def fit_constants(
    errors: Callable[[Constants], Sequence[float]], guess: Constants, spreads: Mapping[str, float]
) -> Constants:
    """Return the constants that explain measurements best, given how far each may be from its guess.

    It minimises Σ error² + Σ (ln(constant / guess) / spread)², where terms well above 1 count less (``soft_l1``).

    Args:
        errors: ln(planned / measured) of each measurement under some constants, divided by its standard deviation.
        spreads: name of a constant to fit → standard deviation of the logarithm of its guess.
    """
    # scipy takes a second to import.
    from scipy.optimize import least_squares

    names = list(spreads)
    start = [getattr(guess, name) for name in names]

    def with_logs(logs: Sequence[float]) -> Constants:
        return replace(guess, **{n: s * math.exp(log) for n, s, log in zip(names, start, logs, strict=True)})

    def residuals(logs: Sequence[float]) -> list[float]:
        found = list(errors(with_logs(logs)))
        return found + [log / spreads[name] for name, log in zip(names, logs, strict=True)]

    limit = math.log(LARGEST_CHANGE)
    best = least_squares(residuals, [0.0] * len(names), bounds=(-limit, limit), loss="soft_l1", diff_step=1e-3)
    return with_logs([float(log) for log in best.x])
