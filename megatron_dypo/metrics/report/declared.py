"""Panels of the metrics that an objective declares, and of names that nobody declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_dypo.metrics.names import Metric, lookup
from megatron_dypo.metrics.report.panels import CYCLE, PANELS, Line, Panel


def all_panels(records: Sequence[Mapping[str, Any]], declared: Sequence[Metric] = ()) -> list[Panel]:
    """Return the report's own panels, with a line for each declared metric that names its panel, and new ones.

    A metric whose name is in no table gets its own panel.
    """
    panels = {panel.title: panel for panel in PANELS}
    drawn = {line.metric for panel in PANELS for line in panel.lines}
    for metric in declared:
        if metric.panel and metric.name not in drawn:
            panel = panels.get(metric.panel, Panel(title=metric.panel, unit=metric.unit, note="", lines=()))
            panels[metric.panel] = _with_line(panel, metric.name, metric.name.rpartition("/")[2])
    names = dict.fromkeys(name for record in records for name in record)
    for name in _unknown((name for name in names if name not in drawn), declared):
        panels[name] = _with_line(Panel(title=name, note="No table of metrics has this name.", lines=()), name, name)
    return list(panels.values())


def _with_line(panel: Panel, metric: str, label: str) -> Panel:
    return replace(panel, lines=(*panel.lines, Line(metric, label, CYCLE[len(panel.lines) % len(CYCLE)])))


def _unknown(names: Iterable[str], declared: Sequence[Metric]) -> Iterable[str]:
    for name in names:
        if name in ("step", "time"):
            continue
        try:
            lookup(name, declared)
        except ValueError:
            yield name
