"""``planned.json``: the seconds that ``megatron-dypo plan`` gives the parts of a run's step, for its report.

A run on GPUs with a known data sheet writes it at its start. The plan's lengths are assumptions then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_dypo.fs import replace_file
from megatron_dypo.json_text import parse_json

PLANNED_FILE = "planned.json"

PARTS: dict[str, tuple[str, ...]] = {
    "rollout": ("timing_s/gen",),
    "log-probs": ("timing_s/old_log_prob", "timing_s/ref_log_prob"),
    "update": ("timing_s/update_actor",),
    "refit": ("timing_s/refit",),
    "loop": ("timing_s/reward", "timing_s/other"),
    "step": ("timing_s/step",),
}
"""Part of a planned step → the metrics that measure it; their sum counts."""


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """Planned seconds of a part of a step, with the interval of the plan."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """The plan of a step."""

    prompt_tokens: float
    """Assumed mean length of a prompt."""
    response_tokens: float
    """Assumed mean length of a response."""
    parts: Mapping[str, PlannedPart]
    """Keys of ``PARTS``."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the report's table: a part of a step, planned and measured."""

    part: str
    planned: PlannedPart
    measured: float
    """Seconds, the mean over the steps."""

    @property
    def is_within(self) -> bool:
        return self.planned.low <= self.measured <= self.planned.high


def write_planned(run_dir: Path, planned: PlannedStep) -> None:
    replace_file(run_dir / PLANNED_FILE, json.dumps(asdict(planned), indent=1) + "\n")


def read_planned(run_dir: Path) -> PlannedStep | None:
    """Return the plan that the run wrote, or None; ValueError if its file is damaged."""
    path = run_dir / PLANNED_FILE
    if not path.is_file():
        return None
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
        return PlannedStep(**{**raw, "parts": {name: PlannedPart(**part) for name, part in raw["parts"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a planned step: {error}") from error


def steady_steps(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records with times but the first, whose step compiles and warms up; the first if it is alone."""
    timed = [record for record in records if record.get("timing_s/step") is not None]
    return timed[1:] or timed


def measured_seconds(records: Sequence[Mapping[str, Any]], part: str) -> float | None:
    """Return the mean seconds of a part over ``records``; None if no step has it.

    A part that only some steps have, such as a refit after the last of several updates, counts by its share.
    """
    names = PARTS[part]
    known = [name for name in names if any(record.get(name) is not None for record in records)]
    return sum(fmean(record.get(name) or 0.0 for record in records) for name in known) if known else None


def compare_with_plan(planned: PlannedStep, records: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Return planned beside measured for each part that the run measured."""
    steady, rows = steady_steps(records), []
    for part, seconds in planned.parts.items():
        measured = measured_seconds(steady, part) if part in PARTS else None
        if measured is not None:
            rows.append(Comparison(part=part, planned=seconds, measured=measured))
    return rows
