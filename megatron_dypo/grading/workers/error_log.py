"""Warnings of verifications that gave no verdict: each kind of error once in full, then as a count."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megatron_dypo.config.words import counted
from megatron_dypo.grading.pairs import Pair
from megatron_dypo.grading.workers.results import shown

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 300


class ErrorLog:
    """Counts errors by kind; logs a kind when it is new, and again when ten times as many have come."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def report(self, failed: Sequence[tuple[Pair, str]], num_pairs: int) -> None:
        """Log the errors of one call, one line for each kind at most."""
        by_kind: dict[str, list[tuple[Pair, str]]] = {}
        for pair, error in failed:
            by_kind.setdefault(_kind(error), []).append((pair, error))
        for kind, cases in by_kind.items():
            before = self._counts[kind]
            self._counts[kind] = now = before + len(cases)
            if before and len(str(before)) == len(str(now)):
                continue
            pair, error = cases[0]
            logger.warning(
                "no verdict on %d of %s (%d since the start): %s; answer %s; response ends %r",
                len(cases),
                counted(num_pairs, "response"),
                now,
                error,
                shown(pair.answer),
                pair.response[-_SHOWN_CHARACTERS:],
            )


def _kind(error: str) -> str:
    """Return the text before the first colon, the exception's name; the rest differs from case to case."""
    return error.partition(":")[0]
