"""Draw a diagram of boxes and arrows from a YAML source.

size: [940, 300]
title: what the picture shows
boxes:
  prompts: {at: [20, 40], size: [120, 60], text: [Prompts, data/]}        # first line bold; `kind` gives the colour
arrows:
  - {from: prompts, to: servers, text: k answers}                         # `via`: corners on the way
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tools.pictures.svg import INK, LINE, SOFT, TIERS, document, element, label

_FILLS = {"plain": "#ffffff", "outside": "#f5f7f9", "strong": "#e8f0fa", **TIERS}
_LINE_HEIGHT = 17.0
Point = tuple[float, float]


def draw_diagram(source: Path) -> str:
    """Return the SVG of a source file."""
    spec = yaml.safe_load(source.read_text(encoding="utf-8"))
    boxes: Mapping[str, Any] = spec["boxes"]
    parts = [_frame(frame) for frame in spec.get("frames", [])]
    parts += [part for arrow in spec["arrows"] for part in _arrow(arrow, boxes)]
    parts += [part for box in boxes.values() for part in _box(box)]
    width, height = spec["size"]
    return document(width, height, spec["title"], parts)


def _frame(frame: Mapping[str, Any]) -> str:
    (x, y), (width, height) = frame["at"], frame["size"]
    area = element(
        "rect", x=x, y=y, width=width, height=height, rx=10, fill="#fafbfc", stroke=LINE, stroke_dasharray="4 4"
    )
    return area + "\n" + label(x + 12, y + 20, frame["text"], text_anchor="start", fill=SOFT, font_size=12)


def _box(box: Mapping[str, Any]) -> list[str]:
    (x, y), (width, height) = box["at"], box["size"]
    kind = box.get("kind", "plain")
    ink = "#ffffff" if kind in ("easy", "hard") else INK
    lines: Sequence[str] = box["text"]
    first = y + height / 2 - (len(lines) - 1) * _LINE_HEIGHT / 2 + 4.5
    parts = [element("rect", x=x, y=y, width=width, height=height, rx=8, fill=_FILLS[kind], stroke=SOFT)]
    for index, line in enumerate(lines):
        weight = {"font_weight": "600"} if index == 0 else {"font_size": 12}
        parts.append(label(x + width / 2, first + index * _LINE_HEIGHT, line, fill=ink, **weight))
    return parts


def _arrow(arrow: Mapping[str, Any], boxes: Mapping[str, Any]) -> list[str]:
    via = [(float(x), float(y)) for x, y in arrow.get("via", [])]
    start, end = boxes[arrow["from"]], boxes[arrow["to"]]
    first = _edge(start, via[0] if via else _middle(end))
    last = _edge(end, via[-1] if via else first)
    if not via:
        first = _edge(start, last)
    points = [first, *via, last]
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    ends = {"marker_start": "url(#arrow)"} if arrow.get("both") else {}
    parts = [element("path", d=path, fill="none", stroke=SOFT, stroke_width=1.5, marker_end="url(#arrow)", **ends)]
    if "text" in arrow:
        x, y = arrow.get("text_at") or _halfway(points)
        parts.append(label(x, y - 7, arrow["text"], fill=SOFT, font_size=12))
    return parts


def _middle(box: Mapping[str, Any]) -> Point:
    (x, y), (width, height) = box["at"], box["size"]
    return x + width / 2, y + height / 2


def _edge(box: Mapping[str, Any], towards: Point) -> Point:
    """Return the point of the box's edge that faces a point: straight across if the point lies beside the box."""
    (x, y), (width, height) = box["at"], box["size"]
    if x + width <= towards[0] or towards[0] <= x:
        side = x + width if x + width <= towards[0] else x
        return float(side), float(min(max(towards[1], y + 10), y + height - 10))
    side = y + height if y + height <= towards[1] else y
    return float(min(max(towards[0], x + 10), x + width - 10)), float(side)


def _halfway(points: Sequence[Point]) -> Point:
    """Return the middle of the longest piece of the line through ``points``."""
    pieces = pairwise(points)
    (x0, y0), (x1, y1) = max(pieces, key=lambda piece: abs(piece[0][0] - piece[1][0]) + abs(piece[0][1] - piece[1][1]))
    return (x0 + x1) / 2, (y0 + y1) / 2
