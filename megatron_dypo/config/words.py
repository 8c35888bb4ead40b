"""Words of messages."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 row`` or ``2 rows``: the count with its noun; ``plural`` where that is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
