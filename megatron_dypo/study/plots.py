"""Plotly figures of a comparison: for each column a dot with its interval for each arm, and the seeds behind it."""

from __future__ import annotations

import plotly.graph_objects as go

from megatron_dypo.metrics.report.plots import Plot
from megatron_dypo.study.results import Column, Result, Scores

_DOT, _SEED = "#2f6db5", "#98a1ab"


def plot_columns(result: Result, scores: Scores) -> list[Plot]:
    """Return a plot for each column that has an estimate."""
    return [
        Plot(
            f"{result.name}: {column.name}",
            "Dot and bar: mean and 95% interval over seeds and items. Rings: the seeds.",
            _figure(result, column, scores),
        )
        for column in result.columns
        if any((arm, column.name) in result.estimates for arm in result.arms)
    ]


def _figure(result: Result, column: Column, scores: Scores) -> go.Figure:
    known = [arm for arm in reversed(result.arms) if (arm, column.name) in result.estimates]
    spreads = [result.estimates[arm, column.name].spread for arm in known]
    labels = [arm.label for arm in known]
    figure = go.Figure()
    figure.add_scatter(
        x=[one.mean for one in spreads],
        y=labels,
        name="mean",
        mode="markers",
        marker={"color": _DOT, "size": 9},
        error_x={
            "type": "data",
            "array": [0.0 if one.high is None else one.high - one.mean for one in spreads],
            "arrayminus": [0.0 if one.low is None else one.mean - one.low for one in spreads],
            "thickness": 1.4,
            "width": 5,
        },
    )
    if not column.is_average:
        seeds = [
            (float(value), arm.label) for arm in known for value in scores[arm, column.sets[0]].scores_KI.mean(axis=1)
        ]
        ring = {"color": _SEED, "size": 7, "symbol": "circle-open"}
        figure.add_scatter(x=[x for x, _ in seeds], y=[y for _, y in seeds], name="seed", mode="markers", marker=ring)
    figure.update_layout(
        template="none",
        height=90 + 34 * len(known),
        margin={"l": 16, "r": 16, "t": 8, "b": 40},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": "#3b4450"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        xaxis={"title": {"text": "correct"}, "tickformat": ".0%", "gridcolor": "#e8ebef", "zeroline": False},
        yaxis={"automargin": True, "type": "category"},
    )
    return figure
