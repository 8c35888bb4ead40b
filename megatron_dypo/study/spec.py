"""The spec file of a comparison: its methods, seeds, data, evaluation sets and baseline.

``docs/comparison.md`` explains the keys of the YAML file. Every key and every config of a cell is checked before
anything runs.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_dypo.checks import require
from megatron_dypo.config.reading.typed import nearest, unknown_keys
from megatron_dypo.config.reading.yaml_text import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
RESAMPLES = 9_999
_OURS = (sys.executable, "-m", "megatron_dypo.cli")
OUR_TRAIN_COMMAND = (*_OURS, "train", "{config}")
OUR_EVAL_COMMAND = (*_OURS, "eval", "{model}", "--sets", "{sets}", "--out", "{out}")


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table: its rows and columns, and the reference of each row."""

    methods: tuple[str, ...] = ()
    """Methods of the rows, in order. Empty: all of them, in the order of the file."""
    sets: tuple[str, ...] = ()
    """Evaluation sets of the columns. Empty: all of them."""
    against: Literal["baseline", "previous"] = "baseline"
    """``baseline``: each row is compared with the baseline. ``previous``: with the row above it, as in an ablation."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A comparison, as its YAML file describes it."""

    config: str
    """Base config of all cells."""
    out: str
    """Folder of the comparison."""
    methods: dict[str, dict[str, Any]]
    """Name of each method → its overrides of ``config``: dotted key → value."""
    seeds: tuple[int, ...]
    """Seeds (``run.seed``) that every method is trained with."""
    baseline: str
    """Method that the others are compared with."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of each variant of the training data → its overrides. Empty: the data of ``config`` alone."""
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Groups of evaluation sets of ``config``: name of the group → its sets. A group of several sets gets a column with
    their average. Empty: one group, ``avg``, of all sets."""
    tables: dict[str, TableSpec] = field(default_factory=lambda: {"main": TableSpec()})
    """Name of each table → its rows and columns."""
    pass_at: int = 1
    """k of pass@k, which the tables show. 1: the share of correct responses."""
    smallest_difference: float = 0.02
    """Smallest difference that matters to you. If a comparison finds no difference and could not have found this one,
    the table shows it as too small to tell."""
    resamples: int = RESAMPLES
    """Resamples of the items, and permutations. No p-value is smaller than 2 / (resamples + 1)."""
    train_command: tuple[str, ...] = OUR_TRAIN_COMMAND
    """Words of the command that trains a cell; ``{config}`` stands for the cell's config file, ``{cell}`` for its
    folder."""
    eval_command: tuple[str, ...] = OUR_EVAL_COMMAND
    """Words of the command that evaluates a cell; ``{model}`` stands for the HF folder of its run, ``{sets}`` for the
    file of ``megatron-dypo eval --sets``, ``{out}`` for the folder of the records."""

    def __post_init__(self) -> None:
        require(bool(self.methods), "methods={}", "name at least one")
        require(bool(self.seeds), "seeds=[]", "name at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds={list(self.seeds)}", "a seed stands twice")
        for kind, names in (("methods", self.methods), ("data", self.data), ("tables", self.tables)):
            for name in names:
                rule = "a name is a part of a path: letters, digits, . _ + -, at most 64, and not . first"
                require(_NAME.fullmatch(name) is not None, f"{kind}: {name!r}", rule)
        require_known("baseline", self.baseline, self.methods, "method")
        for name, table in self.tables.items():
            for method in table.methods:
                require_known(f"tables.{name}.methods", method, self.methods, "method")
            rule = "a method stands twice"
            require(len(set(table.methods)) == len(table.methods), f"tables.{name}.methods={table.methods}", rule)
        require(self.pass_at >= 1, f"pass_at={self.pass_at}", "must be positive")
        require(self.resamples >= 199, f"resamples={self.resamples}", "must be at least 199")
        is_share = math.isfinite(self.smallest_difference) and 0 < self.smallest_difference < 1
        require(is_share, f"smallest_difference={self.smallest_difference}", "must be in (0, 1)")
        require(bool(self.train_command), "train_command=[]", "must not be empty")
        require(bool(self.eval_command), "eval_command=[]", "must not be empty")

    def groups(self, known: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the groups of evaluation sets, of the sets that the config has.

        Raises:
            ValueError: there is no set; or a group or a table names an unknown one, or one twice.
        """
        names = tuple(known)
        require(bool(names), "eval of config", "names no evaluation set: there is nothing to compare by")
        groups = self.sets or {"avg": names}
        for group, members in groups.items():
            require(bool(members), f"sets.{group}=[]", "name at least one set")
            for name in members:
                require_known(f"sets.{group}", name, names, "evaluation set of config")
        chosen = [name for members in groups.values() for name in members]
        require(
            len(set(chosen)) == len(chosen), f"sets={ {k: list(v) for k, v in groups.items()} }", "a set stands twice"
        )
        for table, spec in self.tables.items():
            for name in spec.sets:
                require_known(f"tables.{table}.sets", name, chosen, "evaluation set of this comparison")
        return groups


def require_known(key: str, name: str, known: Iterable[str], kind: str) -> None:
    """Raise ValueError unless ``name`` is one of ``known``; the message names the nearest."""
    names = list(known)
    if name not in names:
        raise ValueError(f"{key}: {name!r}: no such {kind}; {nearest(name, names, otherwise='known')}")


def read_spec(path: Path) -> Spec:
    """Read the description of a comparison.

    Raises:
        ValueError: one line for each problem, with file, key, value and rule.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must be a mapping of keys")
    problems = unknown_keys(tree, Spec)
    if not problems:
        try:
            # From JSON, since pydantic's strict mode then still accepts a list for a tuple.
            spec: Spec = _adapter().validate_json(json.dumps(tree, default=str), strict=True)
        except ValidationError as error:
            problems = list(_explain(error))
        else:
            return spec
    raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))


@functools.cache
def _adapter() -> TypeAdapter[Spec]:
    return TypeAdapter(Spec)


def _explain(error: ValidationError) -> Iterable[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "missing":
            yield f"{where}: is required"
        elif item["type"] == "value_error":  # a rule of this package, whose message names key and value
            yield item["msg"].removeprefix("Value error, ")
        else:
            yield f"{where}={item['input']!r}: {item['msg']}"
