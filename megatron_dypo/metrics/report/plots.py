"""Plotly figures for the panels of a report, made from the records of ``metrics.jsonl``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.metrics.names import Metric
from megatron_dypo.metrics.report.declared import all_panels
from megatron_dypo.metrics.report.panels import CYCLE, Line, Panel

Records = Sequence[dict[str, Any]]

MAX_POINTS = 1000
"""Most points of one line; a longer series is thinned evenly."""
MAX_BARS = 250
"""Most bars of a stacked plot."""


@dataclass(frozen=True)
class Plot:
    """A panel with data in it."""

    title: str
    note: str
    figure: go.Figure


def build_plots(records: Records, declared: Sequence[Metric] = ()) -> list[Plot]:
    """Return every plot that the records hold data for, in the order of the page.

    ``declared`` are the objective's own metrics.
    """
    plots = [_eval_plot(records)]
    plots += [_panel_plot(panel, records) for panel in (*all_panels(records, declared), _teacher_panel(records))]
    return [plot for plot in plots if plot is not None]


def thin(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most ``limit`` items, evenly spread, with the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def line_plot(panel: Panel, series: Sequence[tuple[Line, Records]]) -> Plot | None:
    """Return a plot of one line for each series that has data; None if none has."""
    figure = go.Figure()
    for line, records in series:
        if any(record.get(line.metric) is not None for record in records):
            _add_line(figure, line, records)
    if not figure.data:
        return None
    style(figure, panel)
    return Plot(panel.title, panel.note, figure)


def held_out_sets(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the evaluation sets that occur in the records."""
    pattern = re.compile(r"eval/([^/]+)/accuracy")
    return sorted({match[1] for record in records for key in record if (match := pattern.fullmatch(key))})


def accuracy_bounds(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return the 95% interval of a set's accuracy: the one in the record, else Wilson's."""
    low, high = (record.get(f"eval/{name}/accuracy_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        return float(low), float(high)
    accuracy, count = float(record[f"eval/{name}/accuracy"]), int(record.get(f"eval/{name}/num_samples") or 0)
    return wilson_interval(accuracy, count) if count else (accuracy, accuracy)


def _panel_plot(panel: Panel, records: Records) -> Plot | None:
    if not panel.stacked:
        return line_plot(panel, [(line, records) for line in panel.lines])
    figure = go.Figure()
    known = [line for line in panel.lines if any(record.get(line.metric) is not None for record in records)]
    if not known:
        return None
    metrics = [line.metric for line in known]
    rows = thin([r for r in records if any(r.get(name) is not None for name in metrics)], MAX_BARS)
    for line in known:
        heights = [_rounded(record.get(line.metric) or 0.0) for record in rows]
        figure.add_bar(x=_steps(rows), y=heights, name=line.label, marker={"color": line.color, "line_width": 0})
    figure.update_layout(barmode="stack", bargap=0.12 if len(rows) <= 60 else 0)
    style(figure, panel)
    return Plot(panel.title, panel.note, figure)


def _add_line(figure: go.Figure, line: Line, records: Records) -> None:
    rows = thin([record for record in records if record.get(line.metric) is not None], MAX_POINTS)
    figure.add_scatter(
        x=_steps(rows),
        y=[_rounded(record[line.metric]) for record in rows],
        name=line.label,
        mode="lines+markers" if len(rows) <= 40 else "lines",
        line={"color": line.color, "width": 2},
        marker={"size": 5},
    )


def _eval_plot(records: Records) -> Plot | None:
    sets = held_out_sets(records)
    figure = go.Figure()
    for name, color in zip(sets, CYCLE * (len(sets) // len(CYCLE) + 1), strict=False):
        rows = thin([r for r in records if r.get(f"eval/{name}/accuracy") is not None], MAX_POINTS)
        accuracy = [float(record[f"eval/{name}/accuracy"]) for record in rows]
        bounds = [accuracy_bounds(record, name) for record in rows]
        figure.add_scatter(
            x=_steps(rows),
            y=[_rounded(value) for value in accuracy],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 6},
            error_y={
                "type": "data",
                "array": [_rounded(high - a) for a, (_, high) in zip(accuracy, bounds, strict=True)],
                "arrayminus": [_rounded(a - low) for a, (low, _) in zip(accuracy, bounds, strict=True)],
                "thickness": 1.2,
                "width": 4,
            },
        )
    if not sets:
        return None
    panel = Panel(title="Held-out accuracy", unit="correct responses", percent=True, lines=())
    style(figure, panel)
    figure.update_layout(showlegend=True)
    return Plot(panel.title, "Bars: 95% Wilson intervals, responses taken as independent.", figure)


def _teacher_panel(records: Records) -> Panel:
    names = sorted({key for record in records for key in record if re.fullmatch(r"teacher/[^/]+/share", key)})
    lines = tuple(Line(key, key.split("/")[1], CYCLE[i % len(CYCLE)]) for i, key in enumerate(names))
    return Panel(title="Teachers drawn", unit="share of traces", stacked=True, percent=True, lines=lines)


def style(figure: go.Figure, panel: Panel) -> None:
    """Give a figure over steps the look of the page."""
    axis = {"gridcolor": "#e8ebef", "zerolinecolor": "#cfd5dc", "linecolor": "#cfd5dc", "automargin": True}
    positive = all(value is None or value > 0 for trace in figure.data for value in trace.y)
    figure.update_layout(
        template="none",
        height=300,
        margin={"l": 56, "r": 16, "t": 8, "b": 40},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": "#3b4450"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        showlegend=len(figure.data) > 1,
        hovermode="x unified",
        paper_bgcolor="white",
        plot_bgcolor="white",
        xaxis={**axis, "title": {"text": "step"}, "showgrid": False, "zeroline": False},
        yaxis={**axis, "title": {"text": panel.unit}, "tickformat": ".0%" if panel.percent else None},
    )
    if panel.log and positive:
        figure.update_yaxes(type="log", exponentformat="power")
    elif panel.percent:
        figure.update_yaxes(range=[0, 1.02])
    if panel.level is not None:
        figure.add_hline(y=panel.level, line={"color": "#98a1ab", "width": 1, "dash": "dash"})


def _steps(records: Records) -> list[int]:
    return [record["step"] for record in records]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
