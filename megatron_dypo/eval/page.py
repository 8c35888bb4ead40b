"""The page of an evaluation: its figures, a curve over k for each set, and some responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from megatron_dypo.eval.records import Record
from megatron_dypo.eval.table import HEAD, rows
from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.report.page import render_template
from megatron_dypo.metrics.report.plots import Plot, thin
from megatron_dypo.metrics.report.sample_table import shorten

PAGE_FILE = "report.html"
MAX_RESPONSES = 60
"""Most responses of each set on the page."""
MAX_CHARS = 6_000
"""Most characters of one response there."""


def render_page(summary: Mapping[str, Any], records: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write the page of an evaluation, all of it or nothing.

    Args:
        summary: the content of ``summary.json``.
        records: set → its records, in any order.
    """
    shown = {name: [_shown(record) for record in _chosen(found)] for name, found in records.items()}
    page = render_template(
        "eval.html.j2",
        title=Path(summary["model"]).name or summary["model"],
        kind="DYPO evaluation",
        facts=[summary["model"], f"{len(records)} sets", f"{sum(map(len, records.values())):,} responses"],
        reload_s=None,
        head=HEAD,
        rows=rows(summary),
        plots=_plots(summary["sets"]),
        responses=shown,
        counts={name: len(found) for name, found in records.items()},
    )
    replace_file(path, page)


def _chosen(records: Sequence[Record]) -> list[Record]:
    ordered = sorted(records, key=lambda record: (record.item, record.sample))
    return thin(ordered, MAX_RESPONSES)


def _shown(record: Record) -> dict[str, Any]:
    mark = {True: "right", False: "wrong", None: "no verdict"}[record.correct]
    text = shorten(record.response, MAX_CHARS).encode("utf-8", "replace").decode()
    return {**asdict(record), "mark": mark, "response": text}


def _plots(sets: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    plots = []
    for kind, note in (
        ("pass@k", "The chance that one of k responses is correct."),
        ("maj@k", "The chance that the majority of k responses is correct."),
    ):
        figure = go.Figure()
        for name, figures in sets.items():
            points = {int(k): value for k, value in figures[kind].items()}
            if len(points) > 1:
                figure.add_scatter(x=list(points), y=list(points.values()), name=name, mode="lines+markers")
        if figure.data:
            figure.update_layout(
                template="none",
                height=300,
                margin={"l": 56, "r": 16, "t": 8, "b": 40},
                showlegend=True,
                xaxis={"title": {"text": "k"}, "type": "log", "tickvals": sorted(_ks(sets, kind))},
                yaxis={"tickformat": ".0%", "rangemode": "tozero", "gridcolor": "#e8ebef"},
            )
            plots.append(Plot(kind, note, figure))
    return plots


def _ks(sets: Mapping[str, Mapping[str, Any]], kind: str) -> set[int]:
    return {int(k) for figures in sets.values() for k in figures[kind]}
