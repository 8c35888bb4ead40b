"""Goodput: the share of a run's wall time in which it trained, and what took the rest.

The wall time goes from the first start to the last sign of life, over all starts. A step that a resume makes again
counts once: its first making is lost. All times are those of the first rank's clock; a clock that was set back makes
a negative part, which counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dypo.metrics.attempts import read_attempts, step_seconds
from megatron_dypo.metrics.records import METRICS_FILE, read_metrics

TRAINING = "training"
_INSIDE = {"timing_s/eval": "evaluation", "timing_s/probe": "probe", "timing_s/save_checkpoint": "saving"}
"""Parts of a step that are no training."""
PARTS = (
    TRAINING,
    *_INSIDE.values(),
    "starting",
    "steps made again",
    "ending",
    "between starts",
    "other",
)
"""``starting``: from a start to its first step; ``ending``: from its last step to its end, with the last checkpoint and
the export; ``between starts``: from an end to the next start, and the unfinished step of a start that was killed."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The wall time of a run and its parts."""

    wall_s: float
    seconds: Mapping[str, float]
    """Part of :data:`PARTS` → seconds. They add up to ``wall_s``, unless a clock was set back."""
    starts: int
    redone_steps: int
    causes: Mapping[str, int]
    """Cause of an end → number of starts that ended with it; ``killed`` for those that did not say it."""

    @property
    def ratio(self) -> float:
        """Share of the wall time that was training."""
        return self.seconds[TRAINING] / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(kw_only=True)
class _Start:
    """One start: its begin, its end, and the times of its records."""

    begin: float
    end: float | None = None
    cause: str = ""
    first_step: float | None = None
    """Begin of its first step."""
    last_step: float | None = None
    """End of its last step."""
    redone_s: float = 0.0
    redone_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def saw(self, first: float, last: float) -> None:
        self.first_step = first if self.first_step is None else min(first, self.first_step)
        self.last_step = last if self.last_step is None else max(last, self.last_step)

    def last_sign(self) -> float:
        return max(time for time in (self.begin, self.last_step, self.end) if time is not None)


def measure_goodput(run_dir: Path) -> Goodput | None:
    """Return the goodput of a run folder; None if no start of it is on record.

    Raises:
        ValueError: a file of the folder is damaged.
    """
    metrics = run_dir / METRICS_FILE
    starts = _starts(read_attempts(run_dir), read_metrics(metrics) if metrics.is_file() else [])
    if not starts:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    for number, start in enumerate(starts):
        following = starts[number + 1].begin if number + 1 < len(starts) else None
        for part, value in _parts(start, following).items():
            seconds[part] += max(value, 0.0)
    wall_s = starts[-1].last_sign() - starts[0].begin
    seconds["other"] = max(wall_s - sum(seconds.values()), 0.0)
    causes: dict[str, int] = {}
    for start in starts[:-1] if not starts[-1].cause else starts:
        causes[start.cause or "killed"] = causes.get(start.cause or "killed", 0) + 1
    return Goodput(
        wall_s=wall_s,
        seconds=seconds,
        starts=len(starts),
        redone_steps=sum(start.redone_steps for start in starts),
        causes=causes,
    )


def _starts(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[_Start]:
    starts: list[_Start] = []
    for event in events:
        if event["event"] == "start":
            starts.append(_Start(begin=event["time"]))
        elif event["event"] == "end" and starts:
            starts[-1].end, starts[-1].cause = event["time"], event["cause"]
        elif event["event"] == "redo" and starts:
            made = _at(starts, event["last_time"])
            made.redone_s += event["seconds"]
            made.redone_steps += event["steps"]
            made.saw(event["first_time"], event["last_time"])
    for record in records if starts else []:
        start, took = _at(starts, record["time"]), step_seconds(record)
        if not took:
            continue
        start.saw(record["time"] - took, record["time"])
        inside = {part: float(record.get(name) or 0.0) for name, part in _INSIDE.items()}
        for part, value in {**inside, TRAINING: took - sum(inside.values())}.items():
            start.seconds[part] = start.seconds.get(part, 0.0) + value
    return starts


def _at(starts: Sequence[_Start], time: float) -> _Start:
    """Return the last start before a time."""
    return next((start for start in reversed(starts) if start.begin <= time), starts[0])


def _parts(start: _Start, following: float | None) -> dict[str, float]:
    last = start.last_sign()
    between = {} if following is None else {"between starts": following - last}
    if start.first_step is None or start.last_step is None:
        return {"starting": last - start.begin, **between}
    ending = {} if start.end is None else {"ending": start.end - start.last_step}
    starting = {"starting": start.first_step - start.begin}
    return {**start.seconds, **starting, "steps made again": start.redone_s, **ending, **between}
