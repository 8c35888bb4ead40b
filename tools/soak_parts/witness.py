"""Witnesses of damage: a checkpoint whose bit was flipped must have been named by the run, if the run read it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tools.soak_parts.faults import DAMAGE

_FLIPPED = re.compile(r"\bof (step_\d+)/")
_LINE = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}) .*?: "
    r"(?:resuming from .*/(?P<taken>step_\d+): \d+ of |DAMAGED CHECKPOINT: .*?/(?P<named>step_\d+)/)",
    re.MULTILINE,
)
_TIME = "%Y-%m-%d %H:%M:%S%z"


@dataclass(kw_only=True)
class Flips:
    """The flipped bits of a run, by what became of their checkpoints."""

    named: list[str] = field(default_factory=list)
    """The run called the checkpoint damaged."""
    unread: list[str] = field(default_factory=list)
    """The run never read it again: it saved a newer one before its next start, or never started again."""
    silent: list[str] = field(default_factory=list)
    """The next start took this checkpoint or an older one, and called none damaged."""


@dataclass(frozen=True, kw_only=True)
class _Log:
    """The lines of a run about its checkpoints: (time, name of the checkpoint), by time."""

    named: Sequence[tuple[float, str]]
    taken: Sequence[tuple[float, str]]


def find_flips(events: Iterable[tuple[str, str, float]], run_dir: Path) -> Flips:
    """Look for a witness of each damage in the run's logs. ``events``: kind, words and time of each fault."""
    log, flips = _read_logs(run_dir), Flips()
    for kind, words, moment in events:
        if kind != DAMAGE or (flipped := _FLIPPED.search(words)) is None:
            continue
        name, since = flipped.group(1), math.floor(moment)  # the log has whole seconds
        # The first start after the flip decides: a later one finds other checkpoints, some of the same name.
        at, taken = next(((at, taken) for at, taken in log.taken if at >= since), (math.inf, None))
        if any(since <= when <= at and found == name for when, found in log.named):
            flips.named.append(words)
        elif taken is None or _step(taken) > _step(name):
            flips.unread.append(words)
        else:
            flips.silent.append(f"{words}: was never called damaged, and the next start took {taken}")
    return flips


def _read_logs(run_dir: Path) -> _Log:
    logs = "".join(path.read_text("utf-8", errors="replace") for path in sorted(run_dir.glob("logs/rank_*.log")))
    found: dict[str, list[tuple[float, str]]] = {"named": [], "taken": []}
    for line in _LINE.finditer(logs):
        kind = "named" if line["named"] else "taken"
        found[kind].append((datetime.strptime(line["time"], _TIME).timestamp(), line[kind]))
    return _Log(**{kind: sorted(lines) for kind, lines in found.items()})


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))
