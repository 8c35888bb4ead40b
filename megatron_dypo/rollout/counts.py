"""What a client counts beside the groups that it returns."""

from __future__ import annotations

from typing import Any

from megatron_dypo.rollout.responses import sampled_lengths


class AttemptCounts:
    """Counts of a client since its context was entered."""

    def __init__(self) -> None:
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.retries = 0
        """Attempts after the first, over all groups."""
        self.wrong_versions = 0
        """Rollouts dropped because other weights than those of the last push sampled them."""
        self.dropped_rollouts = 0
        """Responses that were sampled, at least in part, and thrown away with their group."""
        self.dropped_tokens = 0
        """Tokens of these."""
        self.dropped_longest = 0
        """Tokens of the longest of these."""

    def _count_dropped(self, payload: Any) -> None:
        lengths = sampled_lengths(payload)
        self.dropped_rollouts += len(lengths)
        self.dropped_tokens += sum(lengths)
        self.dropped_longest = max([self.dropped_longest, *lengths])
