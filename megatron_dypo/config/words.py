"""Words of messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 row`` or ``2 rows``: the count with its noun; ``plural`` where that is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def first_of(words: Sequence[str], limit: int) -> str:
    """Return the first ``limit`` of some words, and the number of the others: ``a, b, c and 4 more``."""
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
