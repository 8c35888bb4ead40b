"""The cells of a comparison. A cell is a method with one seed (and one variant of the data), and has its own folder.

| path under ``<out>/cells/<arm>/seed-<n>/`` | content |
| --- | --- |
| ``config.yaml`` | the resolved config of the cell's run |
| ``eval.yaml`` | the sections of it that the evaluation uses, for ``megatron-dypo eval --sets`` |
| ``run/`` | its run folder |
| ``eval/`` | the records of its evaluation |
| ``train.log``, ``eval.log`` | output of the two commands |
| ``run.lock`` | held by the process that runs the cell |
| ``failed.json`` | how the last attempt failed |
| ``done.json`` | written last: training and evaluation are complete |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.reading.load import changed_lines, dump_config, flow_yaml, load_config
from megatron_dypo.config.tree import Config
from megatron_dypo.fs import replace_file
from megatron_dypo.json_text import parse_json
from megatron_dypo.study.spec import OUR_EVAL_COMMAND, Spec

_CHECKPOINT = "checkpoints/latest_checkpointed_iteration.txt"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method on one variant of the data: a row of a table."""

    method: str
    data: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder: ``method`` or ``method@data``."""
        return self.method if self.data is None else f"{self.method}@{self.data}"

    @property
    def label(self) -> str:
        return self.method if self.data is None else f"{self.method} ({self.data})"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a comparison, with its evaluation."""

    number: int
    """Its place among all cells, from 0."""
    arm: Arm
    seed: int
    folder: Path
    config: Config

    @property
    def label(self) -> str:
        return f"{self.arm.label} seed {self.seed}"

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def sets_path(self) -> Path:
        return self.folder / "eval.yaml"

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def eval_dir(self) -> Path:
        return self.folder / "eval"

    @property
    def failed_path(self) -> Path:
        return self.folder / "failed.json"

    @property
    def done_path(self) -> Path:
        return self.folder / "done.json"

    def is_done(self) -> bool:
        """Return whether training and evaluation are complete."""
        return self.done_path.is_file()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How an attempt to run a cell failed, as ``failed.json`` has it."""

    stage: str
    """``training`` or ``evaluation``."""
    status: int
    """Exit status of the command."""
    cause: str
    """Label of a :class:`~megatron_dypo.ending.Cause`."""
    message: str

    def text(self) -> str:
        return f"{self.stage} failed: {self.cause} (status {self.status}): {self.message}"

    def write(self, path: Path) -> None:
        replace_file(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")


def arms_of(spec: Spec) -> list[Arm]:
    """Return the arms in the order of the spec file."""
    return [Arm(method=method, data=data) for method in spec.methods for data in spec.data or (None,)]


def plan_cells(spec: Spec) -> list[Cell]:
    """Return every cell with its checked config.

    Seeds vary slowest, so that an interrupted comparison has all methods with the first seeds.

    Raises:
        ValueError: a method's or a variant's override breaks a rule of the config; each is named.
    """
    problems: list[str] = []
    cells: list[Cell] = []
    for seed in spec.seeds:
        for arm in arms_of(spec):
            folder = Path(spec.out) / "cells" / arm.name / f"seed-{seed}"
            try:
                config = _config_of(spec, arm, seed, folder)
            except ValueError as error:
                problems += [f"{arm.label}: {line}" for line in str(error).splitlines()]
                continue
            cells.append(Cell(number=len(cells), arm=arm, seed=seed, folder=folder, config=config))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return cells


def _config_of(spec: Spec, arm: Arm, seed: int, folder: Path) -> Config:
    chosen = {**(spec.data[arm.data] if arm.data is not None else {}), **spec.methods[arm.method]}
    for key in chosen:
        if "." not in key:
            raise ValueError(f"{key}: an override must have the form section.key, as in objective.name: grpo")
        if key in ("run.seed", "run.dir"):
            raise ValueError(f"{key}: the comparison sets it")
    chosen |= {"run.seed": seed, "run.dir": str(folder / "run")}
    config = load_config(spec.config, [f"{key}={flow_yaml(value)}" for key, value in chosen.items()])
    if not config.export.hf:
        raise ValueError("export.hf=false: must be true: the exported model is evaluated")
    if config.rollout.servers.urls and spec.eval_command == OUR_EVAL_COMMAND:
        raise ValueError(
            f"rollout.servers.urls={list(config.rollout.servers.urls)}: must be empty: each cell starts servers of its "
            "own, for given ones may have the weights of another cell when a model is evaluated"
        )
    return config


def write_configs(cell: Cell) -> None:
    """Write the files that the cell's two commands read."""
    config = cell.config
    of_eval = EvalCommandConfig(
        seed=config.run.seed,  # also the seed of the responses, so that each run has different draws
        dtype=config.model.dtype,
        shared_files=config.run.shared_files,
        data=dataclasses.replace(config.data, prompts=()),
        rollout=config.rollout,
        grading=config.grading,
        eval=config.eval,
    )
    replace_file(cell.config_path, dump_config(config))
    replace_file(cell.sets_path, dump_config(of_eval))


def require_own_settings(cell: Cell) -> None:
    """Raise ValueError if the content of the cell's folder was made with other settings than the cell has now.

    Keys that the old config lacks belong to a newer version of the package, and are allowed.
    """
    if not cell.is_done() and not (cell.run_dir / _CHECKPOINT).is_file():
        return
    lines = changed_lines(cell.config_path.read_text(encoding="utf-8"), dump_config(cell.config))
    if changed := [line for line in lines if ": absent → " not in line]:
        raise ValueError(
            f"{cell.folder}: was made with other settings: {'; '.join(changed)}; restore them, choose another out, or "
            "remove this folder"
        )


def failure_of(cell: Cell) -> Failure | None:
    """Return how the cell's last attempt failed; None if it did not fail or left no report."""
    try:
        return Failure(**parse_json(cell.failed_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def mark_done(cell: Cell, content: Mapping[str, Any]) -> None:
    """Write the file that says that the cell is complete."""
    replace_file(cell.done_path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
