"""Print a metric of the final runs over the steps: the mean over the seeds and its 95% interval.

    python examples/tiny_study/over_steps.py gal/eta dypo gal_only        # runs/tiny_study, first task
    python examples/tiny_study/over_steps.py gal/eta dypo --parts 5

Each number is a mean over a part of the steps in each run first, then over the runs. So the interval, Student's t, is
over seeds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1]))
from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.study.compare import open_comparison
from tiny_study.plan import STUDY, Plan, open_plan
from tiny_study.specs import spec_path


def main(
    metric: Annotated[str, typer.Argument(help="A key of metrics.jsonl, such as gal/eta.")],
    methods: Annotated[list[str], typer.Argument(help="Methods or ablations.")],
    parts: Annotated[int, typer.Option(min=1, help="Number of equal parts of the steps.")] = 3,
    path: Annotated[Path, typer.Option("--plan", help="The plan of the study.")] = STUDY,
) -> None:
    """Print a table: a row for each method, a column for each part of the steps."""
    plan = open_plan(path)
    edges = [round(plan.steps * part / parts) for part in range(parts + 1)]
    spans = [(first + 1, last) for first, last in itertools.pairwise(edges) if last > first]
    print(f"| {metric} | {' | '.join(f'steps {first} to {last}' for first, last in spans)} |")
    print("|---|" + "---|" * len(spans))
    for method in methods:
        runs = values_of(plan, method, metric)
        means = [[fmean(own) for run in runs if (own := _within(run, span))] for span in spans]
        print(f"| {method} | {' | '.join(map(interval, means))} |")


def values_of(plan: Plan, method: str, metric: str) -> list[dict[int, float]]:
    """Return for each finished run of a method: step → value of the metric, where a step has one.

    Raises:
        ValueError: no run of the method is done, or none has the metric.
    """
    cells = open_comparison(spec_path(plan, plan.tasks[0], "final")).cells
    done = [cell for cell in cells if cell.arm.name == method and cell.is_done()]
    if not done:
        raise ValueError(f"{method}: no finished run of that name is in {plan.folder(plan.tasks[0])}")
    records = [read_metrics(cell.run_dir / "metrics.jsonl") for cell in done]
    runs = [{one["step"]: one[metric] for one in run if one.get(metric) is not None} for run in records]
    if not any(runs):
        raise ValueError(f"{metric}: no run of {method} has this metric")
    return runs


def interval(values: Sequence[float]) -> str:
    """Return the mean with its 95% interval; the mean alone, if there are fewer than two values."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    mean = fmean(values)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def _within(run: dict[int, float], span: tuple[int, int]) -> list[float]:
    return [value for step, value in run.items() if span[0] <= step <= span[1]]


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
