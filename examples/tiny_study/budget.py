"""The arithmetic of a plan: how many cells, steps and rollouts, and how many seconds by the plan's estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.config.reading.load import flow_yaml, load_config
from megatron_dypo.config.tree import Config
from megatron_dypo.objective.recipes.registry import build_objective
from tiny_study.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the arithmetic: cells of one kind."""

    what: str
    cells: int
    seconds: float
    """All of them together."""


def steps_with_rollouts(plan: Plan, overrides: Mapping[str, Any]) -> int:
    """Return how many steps of a method sample rollouts; the others learn from traces alone."""
    return _steps_with_rollouts(plan, config_of(plan, overrides))


def _steps_with_rollouts(plan: Plan, config: Config) -> int:
    objective = build_objective(config.objective)
    return sum(objective.needs_rollouts(step) for step in range(plan.steps))


def config_of(plan: Plan, overrides: Mapping[str, Any]) -> Config:
    """Return the config of the plan's cells with overrides of one method; its files need not exist."""
    changes = [f"{key}={flow_yaml(value)}" for key, value in {**plan.overrides, **overrides}.items()]
    return load_config(plan.config, changes)


def cell_seconds(plan: Plan, overrides: Mapping[str, Any]) -> float:
    """Return the time of one cell of a method."""
    config, seconds = config_of(plan, overrides), plan.seconds
    sampled = _steps_with_rollouts(plan, config)
    steps = sampled * seconds.step + (plan.steps - sampled) * seconds.step_of_traces
    probes = _probed_groups(plan, config) / config.rollout.prompts_per_round * seconds.step
    return seconds.cell + steps + probes


def probed_groups(plan: Plan, overrides: Mapping[str, Any]) -> int:
    """Return how many groups the probes of a run measure. Each takes about the time of a group of an update."""
    return _probed_groups(plan, config_of(plan, overrides))


def _probed_groups(plan: Plan, config: Config) -> int:
    probe = config.probe
    return plan.steps // probe.every * probe.prompts * probe.repeats if probe.every else 0


def budget(plan: Plan) -> list[Line]:
    """Return the lines of the arithmetic."""
    methods = {name: cell_seconds(plan, own) for name, own in plan.methods.items()}
    copies = [methods[method] for method in plan.copies.values()]
    ablations = [cell_seconds(plan, own) for own in plan.ablations.values()]
    tasks, rates, seeds = len(plan.tasks), len(plan.learning_rates), len(plan.seeds)
    lines = [Line(what="warm starts", cells=tasks, seconds=tasks * plan.seconds.inputs)]
    if plan.is_tuned:
        tuned = tasks * rates
        lines.append(
            Line(what="learning rates", cells=tuned * len(methods), seconds=tuned * sum(methods.values())),
        )
    finals = [*methods.values(), *copies]
    lines.append(Line(what="methods", cells=tasks * seeds * len(finals), seconds=tasks * seeds * sum(finals)))
    if ablations:
        lines.append(Line(what="ablations", cells=seeds * len(ablations), seconds=seeds * sum(ablations)))
    return lines


def hours(plan: Plan) -> float:
    """Return the time of the whole study in hours."""
    return sum(line.seconds for line in budget(plan)) / 3600


def budget_table(plan: Plan) -> str:
    """Return the arithmetic as a Markdown table."""
    rows = [f"| {line.what} | {line.cells} | {line.seconds:,.0f} |" for line in budget(plan)]
    cells, seconds = (sum(values) for values in zip(*((one.cells, one.seconds) for one in budget(plan)), strict=True))
    total = f"| all | {cells} | {seconds:,.0f} = {hours(plan):.1f} h |"
    return "\n".join(["| runs | number | seconds |", "|---|---:|---:|", *rows, total])
