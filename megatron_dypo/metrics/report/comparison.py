"""``comparison.html``: several runs on one page, with overlaid curves, final figures and differences of configs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_dypo.config.reading.load import flow_yaml
from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.report.page import CONFIG_FILE, read_records, read_status_text, render_template
from megatron_dypo.metrics.report.panels import CYCLE, Line, Panel
from megatron_dypo.metrics.report.plots import Plot, Records, accuracy_bounds, held_out_sets, line_plot
from megatron_dypo.metrics.report.tiles import NUM_EDGE_STEPS, duration

_ABSENT = "–"

COMPARED: tuple[tuple[str, Panel], ...] = (
    ("rollout/reward", Panel(title="Reward", unit="mean over rollouts")),
    ("gate/easy", Panel(title="Easy", unit="share of graded prompts", percent=True)),
    ("gate/mid", Panel(title="Mid", unit="share of graded prompts", percent=True)),
    ("gate/hard", Panel(title="Hard", unit="share of graded prompts", percent=True)),
    ("train/loss", Panel(title="Loss", unit="loss")),
    ("gal/eta", Panel(title="GAL: η", unit="mean over pairs", level=0.25)),
    ("train/entropy", Panel(title="Policy entropy", unit="nats per token")),
    ("train/grad_norm", Panel(title="Gradient norm", unit="before clipping", log=True)),
    (
        "train/train_rollout_logprob_abs_diff",
        Panel(title="Log-prob gap", unit="nats per token", note="Servers against trainer, same weights.", log=True),
    ),
    ("rollout/response_len/mean", Panel(title="Response length", unit="tokens, mean")),
    ("rollout/truncated_ratio", Panel(title="Truncated", unit="share of rollouts")),
    ("timing_s/step", Panel(title="Time of a step", unit="seconds")),
    ("perf/tokens_per_sec", Panel(title="Throughput", unit="tokens per second")),
)
"""The metrics that are compared, one plot each with a line for each run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a comparison."""

    name: str
    records: Records
    config: dict[str, Any]
    """Value of each dotted key of ``config.yaml``; empty without that file."""
    ending: str
    """How the run ended; empty while it goes on."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, with a cell for each run."""

    label: str
    cells: tuple[str, ...]


def render_comparison(run_dirs: Sequence[Path], out: Path, *, reload_s: int | None = None) -> Path:
    """Write the comparison of several runs to ``out``, all of it or nothing, and return its path.

    Raises:
        ValueError: a folder is not a run's, a file of it is damaged, or a folder is given twice.
    """
    runs = [_read_run(run_dir, name) for run_dir, name in zip(run_dirs, run_names(run_dirs), strict=True)]
    page = render_template(
        "comparison.html.j2",
        title=" · ".join(run.name for run in runs),
        kind="DYPO comparison",
        facts=[f"{len(runs)} runs", *([f"live: reloads every {reload_s} s"] if reload_s else [])],
        reload_s=reload_s,
        names=[run.name for run in runs],
        colors=[color for _, color in zip(runs, _colors(), strict=False)],
        figures_at_end=end_figures(runs),
        differences=config_differences(runs),
        plots=overlaid_plots(runs),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    return out


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of equal depth, that differ from each other."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{', '.join(map(str, run_dirs))}: a run folder is given twice")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def config_differences(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each config key whose values differ. A key that a run's config lacks is shown as absent."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = (Row(label=key, cells=tuple(_value(run.config, key) for run in runs)) for key in keys)
    return [row for row in rows if len(set(row.cells)) > 1]


def end_figures(runs: Sequence[Run]) -> list[Row]:
    """Return how each run ended: accuracy with its interval, tiers, lengths and times of its last steps."""
    rows = [
        Row(label="end", cells=tuple(run.ending or "goes on" for run in runs)),
        Row(label="steps", cells=tuple(f"{run.records[-1]['step']:,}" if run.records else "0" for run in runs)),
    ]
    for name in held_out_sets(record for run in runs for record in run.records):
        rows.append(Row(label=f"accuracy on {name}, first", cells=tuple(_accuracy(run, name, 0) for run in runs)))
        rows.append(Row(label=f"accuracy on {name}, last", cells=tuple(_accuracy(run, name, -1) for run in runs)))
    for label, metric, shown in (
        ("reward", "rollout/reward", "{:.3f}"),
        ("Easy", "gate/easy", "{:.0%}"),
        ("Mid", "gate/mid", "{:.0%}"),
        ("Hard", "gate/hard", "{:.0%}"),
        ("policy entropy", "train/entropy", "{:.3f}"),
        ("log-prob gap", "train/train_rollout_logprob_abs_diff", "{:.2e}"),
        ("response length", "rollout/response_len/mean", "{:.0f}"),
    ):
        cells = tuple(_mean(run.records[-NUM_EDGE_STEPS:], metric, shown.format) for run in runs)
        rows.append(Row(label=f"{label}, mean of the last {NUM_EDGE_STEPS} steps", cells=cells))
    rows.append(
        Row(label="time of a step, mean", cells=tuple(_mean(run.records, "timing_s/step", duration) for run in runs))
    )
    return [row for row in rows if any(cell != _ABSENT for cell in row.cells)]


def overlaid_plots(runs: Sequence[Run]) -> list[Plot]:
    """Return a plot for each metric that at least one run has, with one colour for each run."""
    sets = held_out_sets(record for run in runs for record in run.records)
    accuracy = [
        (f"eval/{name}/accuracy", Panel(title=f"Accuracy on {name}", unit="correct responses", percent=True))
        for name in sets
    ]
    plots = []
    for metric, panel in (*accuracy, *COMPARED):
        series = [(Line(metric, run.name, color), run.records) for run, color in zip(runs, _colors(), strict=False)]
        if plot := line_plot(panel, series):
            plots.append(plot)
    return plots


def _read_run(run_dir: Path, name: str) -> Run:
    path = run_dir / CONFIG_FILE
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Run(
        name=name,
        records=read_records(run_dir),
        config=dict(_leaves(config, "")),
        ending=read_status_text(run_dir),
    )


def _leaves(node: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node


def _value(config: dict[str, Any], key: str) -> str:
    return flow_yaml(config[key]) if key in config else _ABSENT


def _accuracy(run: Run, name: str, index: int) -> str:
    known = [record for record in run.records if record.get(f"eval/{name}/accuracy") is not None]
    if not known:
        return _ABSENT
    low, high = accuracy_bounds(known[index], name)
    return f"{known[index][f'eval/{name}/accuracy']:.1%} ({low:.1%} – {high:.1%}), step {known[index]['step']}"


def _mean(records: Records, metric: str, shown: Any) -> str:
    values = [record[metric] for record in records if record.get(metric) is not None]
    return shown(fmean(values)) if values else _ABSENT


def _colors() -> Iterable[str]:
    while True:
        yield from CYCLE
