"""``objective_metrics.json``: the metrics that a run's objective declares. A report cannot import the objective."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_dypo.fs import replace_file
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.names import Metric

DECLARED_FILE = "objective_metrics.json"


def write_declared(run_dir: Path, declared: Sequence[Metric]) -> None:
    """Write name, unit, meaning and panel of each of the objective's metrics, for a report."""
    rows = [{field.name: getattr(metric, field.name) for field in fields(Metric)} for metric in declared]
    replace_file(run_dir / DECLARED_FILE, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def read_declared(run_dir: Path) -> list[Metric]:
    """Return the metrics that the run's objective declared; ValueError if their file is damaged."""
    path = run_dir / DECLARED_FILE
    if not path.is_file():
        return []
    try:
        return [Metric(**row) for row in parse_json(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a list of metrics: {error}") from error
