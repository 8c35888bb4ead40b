"""Laws that the records of a run and the samples of its processes must obey, whatever happened to it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[Mapping[str, Any]]
GAP = "train/train_rollout_logprob_abs_diff"
_DRAWN = "ledger/drawn"
_LEAST_SAMPLES = 120
"""Samples of one process that are enough for a growth: with one each five seconds, a life of ten minutes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The resources of one process at one moment."""

    start: int
    """Number of the start of the run."""
    role: str
    pid: int
    time: float
    rss: int
    descriptors: int
    threads: int


def violations(records: Records, *, max_gap: float) -> list[str]:
    """Return one line for each law that the records break; [] if they obey all."""
    return [*_gaps(records), *_books(records), *_logprobs(records, max_gap)]


def _gaps(records: Records) -> Iterator[str]:
    steps = [record["step"] for record in records]
    for before, after in itertools.pairwise(steps):
        if after != before + 1:
            yield f"metrics: step {after} follows step {before}"


def _books(records: Records) -> Iterator[str]:
    last = 0.0
    for record in records:
        accounts = {name: value for name, value in record.items() if name.startswith("ledger/")}
        if _DRAWN not in accounts:
            continue
        drawn = accounts.pop(_DRAWN)
        if drawn != sum(accounts.values()):
            yield f"step {record['step']}: {drawn:g} draws, and {sum(accounts.values()):g} in the accounts"
        if drawn < last:
            yield f"step {record['step']}: {drawn:g} draws after {last:g}"
        last = drawn


def _logprobs(records: Records, max_gap: float) -> Iterator[str]:
    for record in records:
        gap = record.get(GAP, 0.0)
        if gap is None or gap > max_gap:
            yield f"step {record['step']}: {GAP}={gap}, more than {max_gap:g}"


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return resource → role → growth of the median over the last third of a process's life over its second third.

    Of all processes of a role that lived for long enough, the one that grew most counts.
    """
    by_process: dict[tuple[int, str, int], list[Sample]] = {}
    for sample in samples:
        by_process.setdefault((sample.start, sample.role, sample.pid), []).append(sample)
    found: dict[str, dict[str, float]] = {"rss": {}, "descriptors": {}, "threads": {}}
    for (_, role, _), life in by_process.items():
        if len(life) < _LEAST_SAMPLES:
            continue
        middle, end = life[len(life) // 3 : 2 * len(life) // 3], life[2 * len(life) // 3 :]
        for resource, roles in found.items():
            before, after = (statistics.median(getattr(one, resource) for one in part) for part in (middle, end))
            roles[role] = max(roles.get(role, -1.0), after / before - 1 if before else 0.0)
    return found
