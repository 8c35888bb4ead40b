"""Collect the results of a study in one value, which is committed and from which the page is rendered.

The working folder is the repository's root.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from whole_job.stages import ROOT

from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.study.cells import Cell
from megatron_dypo.study.compare import open_comparison
from tiny_study.plan import SETS, Plan
from tiny_study.specs import chosen_rates, results_path, spec_path

CURVES = ("gate/easy", "gate/mid", "gate/hard", "gal/eta", "train/entropy", "train/grad_norm")
"""Metrics whose means over the seeds are kept for each step."""
Results = dict[str, Any]


def collect_results(plan: Plan) -> Results:
    """Return the results of every task whose final runs have begun.

    Raises:
        ValueError: a file of results is damaged.
    """
    tasks = {task: _of_task(plan, task) for task in plan.tasks if results_path(plan, task, "final").is_file()}
    return {"commit": _commit(), "machine": f"{platform.machine()}, Python {platform.python_version()}", "tasks": tasks}


def _of_task(plan: Plan, task: str) -> Results:
    cells = open_comparison(spec_path(plan, task, "final")).cells
    found: Results = json.loads(results_path(plan, task, "final").read_text(encoding="utf-8"))
    done = [cell for cell in cells if cell.is_done()]
    return {
        "rates": chosen_rates(plan, task),
        "tuning": _tuning(plan, task),
        "start": _start(done),
        "seeds": len(plan.seeds),
        "rollouts": {name: fmean(map(_rollouts, own)) for name, own in _by_method(done).items()},
        "tables": found["tables"],
        "texts": {one["name"]: _text(plan, task, one["name"]) for one in found["tables"]},
        "missing": found["missing"],
        "curves": {name: _curves(own) for name, own in _by_method(done).items() if name in plan.shown},
    }


def _text(plan: Plan, task: str, table: str) -> str:
    """Return a table as the comparison has written it in Markdown."""
    return (ROOT / plan.folder(task) / "final" / "tables" / f"{table}.md").read_text(encoding="utf-8")


def _tuning(plan: Plan, task: str) -> Mapping[str, float]:
    """Return the accuracy on the validation set of every run that chose a learning rate."""
    if not plan.is_tuned:
        return {}
    found = json.loads(results_path(plan, task, "tuning").read_text(encoding="utf-8"))
    return {one["row"]: one["mean"] for one in found["tables"][0]["estimates"]}


def _by_method(cells: Iterable[Cell]) -> Mapping[str, list[Cell]]:
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        found[cell.arm.name].append(cell)
    return found


def _records(cell: Cell) -> Sequence[dict[str, Any]]:
    return read_metrics(cell.run_dir / "metrics.jsonl")


def _start(cells: Sequence[Cell]) -> Mapping[str, float]:
    """Return the accuracy before the first step on each set: the mean over all cells, which begin with one model."""
    firsts = [record for cell in cells for record in _records(cell)[:1] if record["step"] == 0]
    return {name: fmean(first[f"eval/{name}/accuracy"] for first in firsts) for name in SETS} if firsts else {}


def _rollouts(cell: Cell) -> float:
    """Return the number of rollouts that a run sampled for training."""
    drawn, sampled = 0.0, 0.0
    for record in _records(cell):
        before, drawn = drawn, record.get("ledger/drawn", drawn)
        sampled += drawn - before if "rollout/reward" in record else 0.0
    return sampled * cell.config.rollout.group_size


def _curves(cells: Sequence[Cell]) -> Mapping[str, list[list[float]]]:
    """Return metric → [step, mean over the runs] for each step that has it."""
    values: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in CURVES}
    for record in (record for cell in cells for record in _records(cell)):
        for name in CURVES:
            if record.get(name) is not None:
                values[name][record["step"]].append(record[name])
    means = {
        name: [[step, _short(fmean(own))] for step, own in sorted(steps.items())] for name, steps in values.items()
    }
    return {name: points for name, points in means.items() if points}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _commit() -> str:
    """Return the commit of the working tree, and whether files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def read_results(plan: Plan) -> Results | None:
    """Return the committed results of a plan; None if there are none."""
    path = ROOT / plan.source
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
