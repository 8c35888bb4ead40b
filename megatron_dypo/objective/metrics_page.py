"""``docs/metrics.md``: the metrics of the trainer and of the built-in objectives, rendered.

Run ``python -m megatron_dypo.objective.metrics_page > docs/metrics.md``.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_dypo.metrics.names import METRICS, Metric
from megatron_dypo.objective.recipes.registry import OBJECTIVES


def all_metrics() -> tuple[Metric, ...]:
    """Return each metric that a run with a built-in objective may write, sorted by prefix."""
    declared = (metric for objective in OBJECTIVES.values() for metric in objective.metrics)
    by_name = {metric.name: metric for metric in (*declared, *METRICS)}
    prefixes = list(dict.fromkeys(_prefix(name) for name in by_name))
    return tuple(sorted(by_name.values(), key=lambda metric: prefixes.index(_prefix(metric.name))))


def markdown(metrics: Iterable[Metric]) -> str:
    """Return the page of these metrics."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |" for metric in metrics]
    head = [
        "# Metrics",
        "",
        "Written by `python -m megatron_dypo.objective.metrics_page`. Each step is one line of `metrics.jsonl` and one",
        "point in TensorBoard. An objective of your own adds its own metrics: see "
        "[adding_an_objective.md](adding_an_objective.md).",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _prefix(name: str) -> str:
    return name.partition("/")[0]


if __name__ == "__main__":
    print(markdown(all_metrics()), end="")
