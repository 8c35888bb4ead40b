"""Draw the picture of a report: four of its curves, from the metrics of a real quickstart run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.pictures.svg import INK, SOFT, TIERS, document, element, label

METRICS = (
    "gate/easy",
    "gate/mid",
    "gate/hard",
    "gate/offline_share_prompts",
    "gate/offline_share_tokens",
    "gal/eta",
    "gal/saturation",
    "eval/heldout/accuracy",
    "eval/heldout/accuracy_low",
    "eval/heldout/accuracy_high",
)
"""The metrics that are drawn, and therefore kept in the source file."""

_WIDTH, _HEIGHT, _GAP = 440.0, 190.0, 60.0
_BLUE, _ORANGE = "#2f6db5", "#d9772b"
Records = Sequence[Mapping[str, Any]]


def source_of_run(metrics: Path) -> str:
    """Return the source of the picture: the drawn metrics of each step of a ``metrics.jsonl``, with four digits."""
    rows = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        row = {name: float(f"{record[name]:.4g}") for name in METRICS if record.get(name) is not None}
        rows.append(json.dumps({"step": record["step"], **row}))
    return "[\n" + ",\n".join(rows) + "\n]\n"


def draw_report(source: Path) -> str:
    """Return the SVG of a source file."""
    records = json.loads(source.read_text(encoding="utf-8"))
    charts = (
        ("Held-out accuracy, 95% intervals", 1.0, _accuracy),
        ("Tiers of graded prompts", 1.0, _tiers),
        (
            "Offline share of the update",
            1.0,
            _lines(("gate/offline_share_prompts", "prompts", _BLUE), ("gate/offline_share_tokens", "tokens", _ORANGE)),
        ),
        ("GAL: η, and saturated pairs", 0.5, _lines(("gal/eta", "η", _BLUE), ("gal/saturation", "saturated", _ORANGE))),
    )
    parts = []
    for index, (title, top, draw) in enumerate(charts):
        place = Axes(50 + (index % 2) * (_WIDTH + _GAP), 45 + (index // 2) * (_HEIGHT + 75), records[-1]["step"], top)
        parts += [label(place.x, place.y - 16, title, text_anchor="start", font_weight="600", font_size=14)]
        parts += [*place.frame(), *draw(records, place)]
    return document(1000, 560, "Curves of a quickstart run", parts)


class Axes:
    """The area of one chart. Steps go to the right, values from 0 to ``top`` go up."""

    def __init__(self, x: float, y: float, last_step: int, top: float) -> None:
        self.x, self.y, self._last_step, self._top = x, y, last_step, top

    def at(self, step: float, value: float) -> tuple[float, float]:
        """Return the point of a value at a step."""
        return self.x + _WIDTH * step / self._last_step, self.y + _HEIGHT * (1 - value / self._top)

    def frame(self) -> list[str]:
        """Return the grid, the ticks and the label of the step axis."""
        parts = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            value = share * self._top
            _, y = self.at(0, value)
            parts.append(element("line", x1=self.x, y1=y, x2=self.x + _WIDTH, y2=y, stroke="#e1e6eb"))
            text = f"{value:.0%}" if self._top == 1 else f"{value:.3g}"
            parts.append(label(self.x - 6, y + 4, text, text_anchor="end", fill=SOFT, font_size=11))
        for step in range(0, self._last_step + 1, 30):
            parts.append(label(self.at(step, 0)[0], self.y + _HEIGHT + 16, str(step), fill=SOFT, font_size=11))
        return [*parts, label(self.x + _WIDTH / 2, self.y + _HEIGHT + 32, "step", fill=SOFT, font_size=11)]


def _accuracy(records: Records, axes: Axes) -> list[str]:
    known = [record for record in records if "eval/heldout/accuracy" in record]
    points = [axes.at(record["step"], record["eval/heldout/accuracy"]) for record in known]
    parts = [element("path", d=_path(points), fill="none", stroke=_BLUE, stroke_width=2)]
    for record, (x, y) in zip(known, points, strict=True):
        low, high = (axes.at(0, record[f"eval/heldout/accuracy_{end}"])[1] for end in ("low", "high"))
        parts.append(element("path", d=_path([(x, low), (x, high)]), stroke=_BLUE, stroke_width=1.5))
        parts.append(element("circle", cx=x, cy=y, r=4, fill=_BLUE))
        is_left = x < axes.x + _WIDTH / 2
        parts.append(
            label(
                x + (10 if is_left else -10),
                y + (20 if is_left else -6),
                f"{record['eval/heldout/accuracy']:.1%}",
                text_anchor="start" if is_left else "end",
                fill=INK,
            )
        )
    return parts


def _tiers(records: Records, axes: Axes) -> list[str]:
    graded = [record for record in records if "gate/easy" in record]
    width = _WIDTH / len(graded)
    parts = []
    for index, record in enumerate(graded):
        below = 0.0
        for tier, color in TIERS.items():
            _, top = axes.at(0, below + record[f"gate/{tier}"])
            _, bottom = axes.at(0, below)
            below += record[f"gate/{tier}"]
            x = axes.x + index * width
            parts.append(element("rect", x=x, y=top, width=width, height=bottom - top, fill=color))
    return [*parts, *_legend(axes, [(tier.capitalize(), color) for tier, color in TIERS.items()])]


def _lines(*series: tuple[str, str, str]) -> Callable[[Records, Axes], list[str]]:
    def draw(records: Records, axes: Axes) -> list[str]:
        parts = []
        for metric, _, color in series:
            points = [axes.at(record["step"], record[metric]) for record in records if metric in record]
            parts.append(element("path", d=_path(points), fill="none", stroke=color, stroke_width=1.5))
        return [*parts, *_legend(axes, [(name, color) for _, name, color in series])]

    return draw


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> list[str]:
    parts = []
    for index, (name, color) in enumerate(entries):
        x = axes.x + _WIDTH - 80.0 * (len(entries) - index)
        parts.append(element("rect", x=x, y=axes.y - 26, width=10, height=10, rx=2, fill=color))
        parts.append(label(x + 15, axes.y - 17, name, text_anchor="start", fill=SOFT, font_size=12))
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
