"""Verdicts → counts of each item → figures of a set. The replicas of a run add up their items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.eval.estimators import (
    Votes,
    avg_at_n,
    avg_interval,
    mean_maj_at_k,
    mean_pass_at_k,
    shown_ks,
)
from megatron_dypo.eval.records import Record


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """Counts over the responses to one item."""

    source: str
    correct: int = 0
    samples: int = 0
    """Responses with a verdict."""
    without_verdict: int = 0
    lost: int = 0
    """Responses that never came: the prompt is too long, a server refused it, or every attempt failed."""
    truncated: int = 0
    tokens: int = 0
    votes: Votes = field(default_factory=Votes)
    """The answers of the responses with a verdict."""
    has_votes: bool = False
    """Whether the verifier can tell which answer a response states."""


def count_records(records: Sequence[Record], *, source: str, asked: int, has_votes: bool) -> ItemScore:
    """Count the records of one item; ``asked`` responses were requested."""
    judged = [record for record in records if record.correct is not None]
    correct = sum(record.correct is True for record in judged)
    wrong = [record.answer for record in judged if not record.correct]
    return ItemScore(
        source=source,
        correct=correct,
        samples=len(judged),
        without_verdict=len(records) - len(judged),
        lost=asked - len(records),
        truncated=sum(record.truncated for record in records),
        tokens=sum(record.num_tokens for record in records),
        votes=Votes(
            correct=correct,
            wrong=Counter(answer for answer in wrong if answer is not None),
            abstained=sum(answer is None for answer in wrong),
        ),
        has_votes=has_votes,
    )


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """The items of a set, or one replica's part of them."""

    items: tuple[ItemScore, ...] = ()

    def __add__(self, other: SetScore) -> SetScore:
        return SetScore(items=self.items + other.items)

    def total(self, name: str) -> int:
        """Return the sum of one count over the items."""
        return sum(getattr(item, name) for item in self.items)

    @property
    def answered(self) -> int:
        """Responses that came."""
        return self.total("samples") + self.total("without_verdict")

    def average(self) -> float | None:
        """Return the share of correct responses among those with a verdict; None without one."""
        return avg_at_n(*self._counts())

    def interval(self) -> tuple[float, float] | None:
        """Return the 95% interval of :meth:`average`; None without a verdict."""
        return avg_interval(*self._counts())

    def pass_at(self) -> dict[int, float]:
        """Return k → pass@k, for the powers of 2 up to the responses of an item."""
        found = {k: mean_pass_at_k(*self._counts(), k) for k in self._ks()}
        return {k: value for k, value in found.items() if value is not None}

    def maj_at(self) -> dict[int, float]:
        """Return k → maj@k; {} if a verifier cannot tell which answer a response states."""
        if not all(item.has_votes for item in self.items):
            return {}
        found = {k: mean_maj_at_k([item.votes for item in self.items], k) for k in self._ks()}
        return {k: value for k, value in found.items() if value is not None}

    def by_source(self) -> dict[str, SetScore]:
        """Return source → its items."""
        parts: dict[str, list[ItemScore]] = {}
        for item in self.items:
            parts.setdefault(item.source, []).append(item)
        return {source: SetScore(items=tuple(parts[source])) for source in sorted(parts)}

    def _counts(self) -> tuple[list[int], list[int]]:
        return [item.correct for item in self.items], [item.samples for item in self.items]

    def _ks(self) -> list[int]:
        return shown_ks(max((item.samples for item in self.items), default=0))


def set_summary(score: SetScore, samples_per_prompt: int) -> dict[str, Any]:
    """Return the figures of a set as ``summary.json`` has them."""
    return {
        **_average(score),
        "samples_per_prompt": samples_per_prompt,
        "pass@k": {str(k): value for k, value in score.pass_at().items()},
        "maj@k": {str(k): value for k, value in score.maj_at().items()},
        "truncated": score.total("truncated"),
        "without_verdict": score.total("without_verdict"),
        "lost": score.total("lost"),
        "mean_tokens": score.total("tokens") / score.answered if score.answered else None,
        "by_source": {source: _average(part) for source, part in score.by_source().items()},
    }


def _average(score: SetScore) -> dict[str, Any]:
    low, high = score.interval() or (None, None)
    return {
        "items": len(score.items),
        "samples": score.total("samples"),
        "avg": score.average(),
        "avg_low": low,
        "avg_high": high,
    }
