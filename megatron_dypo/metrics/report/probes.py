"""The probe's part of a report: verdicts on the paper's assumptions, and plots of ``probe/step_*.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.probe_files import FOLDER, FORMAT, describe_cost
from megatron_dypo.metrics.report.panels import CYCLE, Panel
from megatron_dypo.metrics.report.plots import Plot, style

_OVER_STEPS = (
    ("Probe: variances", "ratio to GRPO's variance", 1.0, "Var(GAL)/Var(GRPO) and Var(mix)/Var(GRPO), given Mid.",
     (("GAL", ("ratios", "gal_to_grpo")), ("mix", ("ratios", "mix_to_grpo")))),
    ("Probe: GRPO and GAL together", "correlation, cosine", 0.0,
     "Correlation of the two gradients, which the paper drops, and the cosine of their means.",
     (("correlation", ("ratios", "correlation")), ("cosine of means", ("cosine_of_means",)))),
    ("Probe: signal", "|mean|² / variance", None, "Signal-to-noise ratio of one prompt's gradient.",
     (("GRPO", ("signal_to_noise", "grpo")), ("GAL", ("signal_to_noise", "gal")), ("mix", ("signal_to_noise", "mix")))),
    ("Probe: best α", "α", None, "α of the least variance, with the covariance and without it, and of the best signal.",
     (("least variance", ("mix", "best_alpha")), ("without covariance", ("mix", "best_alpha_without_covariance")),
      ("best signal", ("signal_to_noise", "best_alpha")))),
)  # fmt: skip
"""Title, unit, dashed level, note and lines of the plots over steps; a line is a path into the moments given Mid."""
_DEPENDENT = {
    "grpo": "Var(GRPO)",
    "gal": "Var(GAL)",
    "covariance": "covariance",
    "gal_to_grpo": "Var(GAL)/Var(GRPO)",
    "correlation": "correlation",
    "best_alpha": "best α",
    "snr_grpo": "signal of GRPO",
    "snr_gal": "signal of GAL",
}
"""Figures of the table of dependences, with the heads of their columns."""


def read_probes(run_dir: Path) -> list[dict[str, Any]]:
    """Return the results of all probes of a run, by step.

    Raises:
        ValueError: a file is damaged, or of another version.
    """
    results = []
    for path in sorted((run_dir / FOLDER).glob("step_*.json")):
        try:
            result = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        found = result.get("format") if isinstance(result, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: format={found}: must be {FORMAT}; measure again with `megatron-dypo probe`")
        results.append(result)
    return sorted(results, key=lambda result: int(result["step"]))


def probe_part(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of one probe beside the plots: verdicts, cost in words, the table of dependences."""
    return {
        "step": result["step"],
        "verdicts": verdict_rows(result),
        "cost": describe_cost(result["cost"]) if "cost" in result else None,
        "heads": ["Setting", "Share of Mid", *_DEPENDENT.values()],
        "dependence": dependence_rows(result),
    }


def verdict_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the assumptions of the paper as rows of a table: claim, verdict, figure, why."""
    return [
        {"claim": one["claim"], "verdict": one["verdict"], "figure": interval(one["estimate"]), "why": one["why"]}
        for one in result["assumptions"]
    ]


def dependence_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return how the figures depend on the setting, as rows of a table: the key with its value, then each figure."""
    return [
        [f"{row['key']}: {row['value']}", f"{row['mid_share']:.3g}", *(interval(row[name]) for name in _DEPENDENT)]
        for row in result["sensitivity"]
    ]


def probe_plots(results: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Return the plots: figures over steps, and of the last probe the variance over α and the teachers' bias."""
    if not results:
        return []
    plots = []
    for title, unit, level, note, lines in _OVER_STEPS:
        figure = go.Figure()
        for (label, path), color in zip(lines, CYCLE, strict=False):
            found = [(result["step"], _at(result["moments"]["mid"], path)) for result in results]
            _add(figure, label, [(x, one) for x, one in found if one["value"] is not None], color)
        plots.append(_plot(figure, title, unit, note, level=level))
    return [*plots, _eta_plot(results), _alpha_plot(results[-1]), *_teacher_plots(results[-1])]


def interval(one: Mapping[str, Any]) -> str:
    """Return an estimate as text."""
    if one["value"] is None:
        return "–"
    ends = "" if one["low"] is None else f" [{one['low']:.3g}, {one['high']:.3g}]"
    return f"{one['value']:.3g}{ends}"


def _eta_plot(results: Sequence[Mapping[str, Any]]) -> Plot:
    figure = go.Figure()
    references = dict.fromkeys(name for result in results for name in result["margins"])
    for name, color in zip(references, CYCLE, strict=False):
        rows = [(result["step"], result["margins"][name]["eta"]) for result in results if name in result["margins"]]
        _add(figure, f"reference {name}", [(x, one) for x, one in rows if one["value"] is not None], color)
    return _plot(figure, "Probe: η", "E[w²]", "¼ where no pair is settled, 0 where all are (eq. 17).", level=0.25)


def _alpha_plot(result: Mapping[str, Any]) -> Plot:
    mix, figure = result["moments"]["mid"]["mix"], go.Figure()
    rows = [(one["alpha"], one["variance"]) for one in mix["grid"] if one["variance"]["value"] is not None]
    _add(figure, "Var(mix)", rows, CYCLE[0])
    note = f"Step {result['step']}, given Mid. Least at α = {interval(mix['best_alpha'])}; configured {mix['alpha']:g}."
    return _plot(figure, "Probe: variance over α", "variance of one prompt's gradient", note, x="α")


def _teacher_plots(result: Mapping[str, Any]) -> list[Plot]:
    teachers = result["teachers"]
    if teachers is None:
        return []
    figure = go.Figure()
    for label, key, color in (("all choices", "all_subsets", CYCLE[0]), ("in their order", "nested", CYCLE[1])):
        _add(figure, label, [(1 / one["teachers"], one[key]) for one in teachers["curve"]], color)
    note = f"Step {result['step']}: {teachers['names']}. Squared error of the mean of m; target: {teachers['target']}."
    return [_plot(figure, "Probe: bias of m teachers", "squared error", note, x="1/m")]


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for name in path:
        tree = tree[name]
    return tree


def _add(figure: go.Figure, label: str, rows: Sequence[tuple[float, Mapping[str, Any]]], color: str) -> None:
    values = [one["value"] for _, one in rows]
    highs, lows = ([one[end] if one[end] is not None else one["value"] for _, one in rows] for end in ("high", "low"))
    figure.add_scatter(
        x=[x for x, _ in rows],
        y=values,
        name=label,
        mode="lines+markers",
        line={"color": color, "width": 2},
        error_y={
            "type": "data",
            "array": [high - value for high, value in zip(highs, values, strict=True)],
            "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
            "thickness": 1.2,
            "width": 4,
        },
    )


def _plot(figure: go.Figure, title: str, unit: str, note: str, *, level: float | None = None, x: str = "step") -> Plot:
    style(figure, Panel(title=title, unit=unit, level=level))
    figure.update_layout(showlegend=True, xaxis_title=x)
    return Plot(title, f"{note} Bars: 95% intervals.", figure)
