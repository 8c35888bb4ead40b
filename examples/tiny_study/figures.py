"""The figures of the page as SVG: tiers, η, entropy and gradient norm over the steps, a line for each method."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whole_job.stages import ROOT

from megatron_dypo.metrics.report.panels import CYCLE

sys.path.append(str(ROOT))
from tools.pictures.svg import SOFT, document, element, label

Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""Method → metric → [step, value] for each step."""

PANELS: tuple[tuple[str, str], ...] = (
    ("gate/easy", "Easy: share of graded prompts"),
    ("gate/mid", "Mid: share of graded prompts"),
    ("gate/hard", "Hard: share of graded prompts"),
    ("gal/eta", "η of GAL"),
    ("train/entropy", "entropy, nats per token"),
    ("train/grad_norm", "gradient norm, logarithmic"),
)
_LOGARITHMIC = {"train/grad_norm"}
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 400.0, 170.0, 80.0, 70.0


def draw_curves(title: str, curves: Curves) -> str:
    """Return the SVG of all panels that have a curve."""
    colors = dict(zip(curves, CYCLE, strict=False))
    known = [(metric, words) for metric, words in PANELS if any(metric in own for own in curves.values())]
    parts = list(_legend(colors))
    for index, (metric, words) in enumerate(known):
        x, y = 60 + (index % 2) * (_WIDTH + _GAP_X), 75 + (index // 2) * (_HEIGHT + _GAP_Y)
        series = {name: own[metric] for name, own in curves.items() if metric in own}
        parts += _panel(x, y, words, series, colors, is_logarithmic=metric in _LOGARITHMIC)
    rows = math.ceil(len(known) / 2)
    return document(2 * _WIDTH + _GAP_X + 90, 75 + rows * (_HEIGHT + _GAP_Y), title, parts)


def _legend(colors: Mapping[str, str]) -> Sequence[str]:
    parts = []
    for index, (name, color) in enumerate(colors.items()):
        parts.append(element("rect", x=60 + 130 * index, y=16, width=10, height=10, rx=2, fill=color))
        parts.append(label(75 + 130 * index, 25, name, text_anchor="start", fill=SOFT))
    return parts


def _panel(
    x: float,
    y: float,
    words: str,
    series: Mapping[str, Sequence[Sequence[float]]],
    colors: Mapping[str, str],
    *,
    is_logarithmic: bool,
) -> list[str]:
    values = [value for points in series.values() for _, value in points]
    last_step = max(step for points in series.values() for step, _ in points)
    height_of, ticks = _scale(values, is_logarithmic=is_logarithmic)
    parts = [label(x, y - 12, words, text_anchor="start", font_weight="600")]
    for value in ticks:
        level = y + _HEIGHT * (1 - height_of(value))
        parts.append(element("line", x1=x, y1=level, x2=x + _WIDTH, y2=level, stroke="#e1e6eb"))
        parts.append(label(x - 6, level + 4, f"{value:.3g}", text_anchor="end", fill=SOFT, font_size=11))
    for name, points in series.items():
        places = [(x + _WIDTH * step / last_step, y + _HEIGHT * (1 - height_of(value))) for step, value in points]
        path = "M" + " L".join(f"{left:.1f} {top:.1f}" for left, top in places)
        parts.append(element("path", d=path, fill="none", stroke=colors[name], stroke_width=1.5))
    parts.append(label(x, y + _HEIGHT + 16, "0", fill=SOFT, font_size=11))
    parts.append(label(x + _WIDTH, y + _HEIGHT + 16, f"step {last_step:g}", fill=SOFT, font_size=11))
    return parts


def _scale(values: Sequence[float], *, is_logarithmic: bool) -> tuple[Callable[[float], float], list[float]]:
    """Return the function from a value to its height from 0 to 1, and the values of the grid."""
    if is_logarithmic:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        high = max(high, low + 1)
        ticks = [10.0**power for power in range(low, high + 1)]
        return (lambda value: (math.log10(max(value, 10.0**low)) - low) / (high - low)), ticks
    top = max(*values, 0.0) or 1.0
    return (lambda value: value / top), [share * top for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def figures_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each figure's file and its content: one figure for each task that has curves."""
    return {
        f"{task}.svg": draw_curves(f"Curves of {task}: means over the seeds", found["curves"])
        for task, found in results["tasks"].items()
        if found["curves"]
    }
