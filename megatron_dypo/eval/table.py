"""The figures of an evaluation as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = ("set", "items", "n", "avg@n", "95% interval", "pass@n", "maj@n", "tokens", "truncated", "no verdict", "lost")
"""Columns; n is the number of responses to each item."""


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each set of ``summary.json``, and one for each source where a set has several."""
    found = []
    for name, figures in summary["sets"].items():
        found.append(_row(name, figures))
        sources = figures["by_source"]
        found += [_part(f"  {source}", part) for source, part in sources.items()] if len(sources) > 1 else []
    return found


def to_text(summary: Mapping[str, Any]) -> str:
    """Return the table for a terminal."""
    lines = [HEAD, *rows(summary)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    n = str(figures["samples_per_prompt"])
    mean = figures["mean_tokens"]
    return (
        *(name, str(figures["items"]), n, *_average(figures)),
        *(_percent(figures[kind].get(n)) for kind in ("pass@k", "maj@k")),
        "–" if mean is None else f"{mean:.0f}",
        *(str(figures[key]) for key in ("truncated", "without_verdict", "lost")),
    )


def _part(name: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    return (name, str(part["items"]), "", *_average(part), "", "", "", "", "", "")


def _average(figures: Mapping[str, Any]) -> tuple[str, str]:
    if figures["avg"] is None:
        return "–", "–"
    return _percent(figures["avg"]), f"{_percent(figures['avg_low'])} to {_percent(figures['avg_high'])}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
