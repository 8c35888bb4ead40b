"""The numbers at the top of a report, from ``summary.json`` or else from the first and last records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from megatron_dypo.metrics.goodput import Goodput
from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.metrics.report.plots import Records

_TIERS = ("easy", "mid", "hard")
NUM_EDGE_STEPS = 5
"""Steps at the start and at the end of a run over which noisy numbers are averaged."""


class Tile(NamedTuple):
    """One number with its label and, if it has one, its interval."""

    label: str
    text: str
    interval: str = ""


def build_tiles(summary: Mapping[str, Any], records: Records) -> list[Tile]:
    """Return the tiles of ``summary``, the content of ``summary.json``; if it is empty, those of the records."""
    if not summary:
        return [*_accuracy_tiles(records), *_tier_tiles(records), *_mean_tiles(records)]
    intervals = {key for key in summary if key.endswith("_interval") and key.removesuffix("_interval") in summary}
    return [
        Tile(key.replace("_", " "), _text(key, value), _text(key, summary.get(f"{key}_interval", "")))
        for key, value in summary.items()
        if key not in intervals
    ]


def goodput_tiles(goodput: Goodput | None) -> list[Tile]:
    """Return the tile of a run's goodput; none if it is not known."""
    return [Tile("goodput", f"{goodput.ratio:.1%}", f"of {duration(goodput.wall_s)}")] if goodput else []


def duration(seconds: float) -> str:
    """Return seconds as ``1 h 02 min``, ``2 min 05 s`` or ``3.2 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _text(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{name} {_text(key, item)}" for name, item in value.items())
    if isinstance(value, list):
        return " – ".join(_text(key, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("seconds"):
        return duration(value)
    if isinstance(value, float) and key.startswith(("accuracy", "tiers", "overhead")):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _accuracy_tiles(records: Records) -> list[Tile]:
    tiles = []
    names = {key for record in records for key in record if re.fullmatch(r"eval/[^/]+/accuracy", key)}
    for name in sorted(names):
        held_out = name.split("/")[1]
        known = [record for record in records if record.get(name) is not None]
        for record in known if len(known) < 2 else (known[0], known[-1]):
            accuracy, num_samples = record[name], int(record.get(f"eval/{held_out}/num_samples") or 0)
            bounds = wilson_interval(accuracy, num_samples) if num_samples else ()
            interval = " – ".join(f"{bound:.1%}" for bound in bounds)
            tiles.append(Tile(f"accuracy on {held_out}, step {record['step']}", f"{accuracy:.1%}", interval))
    return tiles


def _tier_tiles(records: Records) -> list[Tile]:
    graded = [record for record in records if record.get("gate/easy") is not None]
    if not graded:
        return []
    count = min(NUM_EDGE_STEPS, len(graded))
    return [
        Tile(
            f"tiers, {where} {count} steps", " · ".join(f"{tier} {_mean(rows, f'gate/{tier}'):.0%}" for tier in _TIERS)
        )
        for where, rows in (("first", graded[:count]), ("last", graded[-count:]))
    ]


def _mean_tiles(records: Records) -> list[Tile]:
    tiles = []
    if any(record.get("timing_s/step") is not None for record in records):
        tiles.append(Tile("mean time of a step", duration(_mean(records, "timing_s/step"))))
    if any(record.get("perf/overhead_ratio") is not None for record in records):
        tiles.append(Tile("mean overhead", f"{_mean(records, 'perf/overhead_ratio'):.1%}", "of a step"))
    return tiles


def _mean(records: Records, name: str) -> float:
    return fmean(record[name] for record in records if record.get(name) is not None)
