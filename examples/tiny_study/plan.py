"""The plan of a study: everything that is fixed before anything runs. ``study.yaml`` and ``smollm2.yaml`` are plans."""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from whole_job.stages import ROOT

from megatron_dypo.checks import require
from megatron_dypo.config.reading.typed import unknown_keys
from megatron_dypo.config.reading.yaml_text import read_yaml
from megatron_dypo.study.spec import OUR_TRAIN_COMMAND, require_known
from tiny_study.inputs import TASKS

STUDY = Path("examples/tiny_study/study.yaml")
"""The plan that is meant if none is named, from the root."""
SETS = ("heldout", "longer", "phrasing")
"""Sets that final runs are compared on: one of the training distribution, two outside of it."""
RECORDS_COMMAND = (sys.executable, str(ROOT / "examples" / "tiny_study" / "records.py"), "{cell}")


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Estimated times on two idle cores; README.md says from what."""

    inputs: float
    """Data, model and warm start of one task."""
    cell: float
    """A cell without its steps: imports, checks, both evaluations, checkpoint, export."""
    step: float
    """A step with rollouts."""
    step_of_traces: float
    """A step that learns from traces alone."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is fixed in advance."""

    title: str
    config: str
    """Base config of every cell."""
    out: str
    """Folder of the results."""
    page: str
    """Markdown page with the results. Its source and its figures are in a folder of the page's name."""
    command: str
    """The words that run the study, for the page."""
    explanation: str | None = None
    """Page beside ``page``, written by hand, that explains the results; a page with results links to it."""
    tasks: tuple[str, ...]
    steps: int
    learning_rates: tuple[float, ...]
    """The grid of every method."""
    seeds: tuple[int, ...]
    """Seeds of the final runs."""
    methods: dict[str, dict[str, Any]]
    """Name → overrides. The grid of learning rates is searched for each."""
    baseline: str
    """The method that every other one is tested against."""
    seconds: Seconds
    overrides: dict[str, Any] = field(default_factory=dict)
    """Overrides of every cell, beside its model, its data, its sets and its learning rate."""
    warmup_overrides: tuple[str, ...] = ()
    """``section.key=value`` … for the warm starts, whose recipe is otherwise the quickstart's."""
    data_seed: int = 1
    tuning_seed: int = 100
    """Seed of the runs that choose a learning rate; no final run has it."""
    copies: dict[str, str] = field(default_factory=dict)
    """Name → method: entered as a method of its own with the same settings; the tests must find no difference."""
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → overrides, on the first task only, with the learning rate of the baseline."""
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tables of the first task beside ``main``, for the ablations: see docs/comparison.md."""
    notes: tuple[str, ...] = ()
    """More sentences for the page's list of what is fixed, in Markdown."""
    shown: tuple[str, ...] = ()
    """Methods whose curves are drawn."""
    smallest_difference: float = 0.05
    hours: float = 6.0
    """The budget."""
    keep_server: bool = False
    """One server for all cells, instead of one that each cell starts."""
    server_port: int = 31700
    resamples: int = 9_999
    train_command: tuple[str, ...] = OUR_TRAIN_COMMAND
    eval_command: tuple[str, ...] = RECORDS_COMMAND

    def __post_init__(self) -> None:
        for name in self.tasks:
            require_known("tasks", name, TASKS, "task")
        require(bool(self.tasks), "tasks=[]", "name at least one")
        require(bool(self.learning_rates), "learning_rates=[]", "name at least one")
        require(self.steps > 0, f"steps={self.steps}", "must be positive")
        require_known("baseline", self.baseline, self.methods, "method")
        rule = "must not be among seeds: a final run would repeat a run that chose a learning rate"
        require(self.tuning_seed not in self.seeds, f"tuning_seed={self.tuning_seed}", rule)
        for name, method in self.copies.items():
            require_known(f"copies.{name}", method, self.methods, "method")
        for name in self.shown:
            require_known("shown", name, self.methods, "method")
        names = [*self.methods, *self.copies, *self.ablations]
        for name in names:
            require(names.count(name) == 1, name, "stands twice among methods, copies and ablations")

    @property
    def is_tuned(self) -> bool:
        """Whether there is a choice of learning rates."""
        return len(self.learning_rates) > 1

    @property
    def source(self) -> Path:
        """The file that the page is rendered from, relative to the root."""
        page = Path(self.page)
        return page.with_suffix("") / "results.json"

    def folder(self, task: str) -> Path:
        """Return the folder of a task, relative to the root."""
        return Path(self.out) / task


def open_plan(path: Path) -> Plan:
    """Read a plan named on the command line, and make the repository's root the working folder."""
    path = path.resolve() if path != STUDY else ROOT / STUDY
    os.chdir(ROOT)
    return read_plan(path)


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ValueError: one line for each problem, with file, key, value and rule.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must be a mapping of keys")
    if problems := unknown_keys(tree, Plan):
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    try:
        plan: Plan = _adapter().validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ValueError("\n".join(lines)) from error
    return plan


@functools.cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)
