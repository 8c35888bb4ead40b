"""Counts of a client, besides the groups that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dypo.rollout.responses import sampled_lengths


@dataclass(frozen=True, kw_only=True)
class ClientCounts:
    """Counts of failures while groups were sampled."""

    retries: int = 0
    """Attempts after the first, over all groups."""
    wrong_versions: int = 0
    """Rollouts dropped because other weights than those of the last refit sampled them."""
    dropped_rollouts: int = 0
    """Responses that were sampled, at least in part, and thrown away with their group."""
    dropped_tokens: int = 0
    """Tokens of these."""
    dropped_longest: int = 0
    """Tokens of the longest of these."""

    def __add__(self, other: ClientCounts) -> ClientCounts:
        return ClientCounts(
            retries=self.retries + other.retries,
            wrong_versions=self.wrong_versions + other.wrong_versions,
            dropped_rollouts=self.dropped_rollouts + other.dropped_rollouts,
            dropped_tokens=self.dropped_tokens + other.dropped_tokens,
            dropped_longest=max(self.dropped_longest, other.dropped_longest),
        )

    def since(self, before: ClientCounts) -> ClientCounts:
        """Return the counts since ``before``; ``dropped_longest`` stays that since the start."""
        return ClientCounts(
            retries=self.retries - before.retries,
            wrong_versions=self.wrong_versions - before.wrong_versions,
            dropped_rollouts=self.dropped_rollouts - before.dropped_rollouts,
            dropped_tokens=self.dropped_tokens - before.dropped_tokens,
            dropped_longest=self.dropped_longest,
        )


class AttemptCounts:
    """Counts of a client since its context was entered."""

    def __init__(self) -> None:
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.retries = 0
        """Attempts after the first, over all groups."""
        self.wrong_versions = 0
        """Rollouts dropped because other weights than those of the last refit sampled them."""
        self.dropped_rollouts = 0
        """Responses that were sampled, at least in part, and thrown away with their group."""
        self.dropped_tokens = 0
        """Tokens of these."""
        self.dropped_longest = 0
        """Tokens of the longest of these."""

    def counts(self) -> ClientCounts:
        """Return all counts since the context was entered."""
        return ClientCounts(
            retries=self.retries,
            wrong_versions=self.wrong_versions,
            dropped_rollouts=self.dropped_rollouts,
            dropped_tokens=self.dropped_tokens,
            dropped_longest=self.dropped_longest,
        )

    def count_dropped(self, payload: Any) -> None:
        """Count responses that a server sampled and nobody will use."""
        lengths = sampled_lengths(payload)
        self.dropped_rollouts += len(lengths)
        self.dropped_tokens += sum(lengths)
        self.dropped_longest = max([self.dropped_longest, *lengths])
