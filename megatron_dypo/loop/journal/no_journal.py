"""The journal of a rank that writes none."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_dypo.loop.journal.found import Found
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup


class NoJournal:
    """The journal of a follower, or of a run without ``rollout.journal`` or without servers: always empty."""

    def __init__(self) -> None:
        self.found = Found()

    def add(self, group: RolloutGroup | GradedGroup) -> None: ...

    def judge(self, groups: Sequence[GradedGroup]) -> None: ...

    def take(self, step: int, look: int, orders: Sequence[int]) -> None: ...

    def compute_logprobs(self, step: int, look: int) -> None: ...

    def complete(self, step: int) -> None: ...

    def forget_collections(self, step: int) -> None: ...

    def recall(self, prompt: Prompt, *, version: int | None = None) -> RolloutGroup | GradedGroup | None:
        return None

    def may_recall(self, orders: Collection[int]) -> bool:
        return not orders

    def serve(self, version: int) -> None: ...

    def is_over(self, step: int) -> bool:
        return False

    def count_reused(self) -> int:
        return 0

    def begin_anew(self, step: int, unfinished: Collection[int], cursor: int) -> None: ...

    def close(self) -> None: ...
