"""The comparisons of a study: one that chooses learning rates, and the final one, which the script writes from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from whole_job.stages import ROOT

from megatron_dypo.ending import Cause
from megatron_dypo.fs import replace_file
from tiny_study.inputs import TASKS, data_path, start_path
from tiny_study.plan import SETS, Plan

Rates = Mapping[str, float]
"""Method → the learning rate that was chosen."""
DIVERGED = f"training failed: {Cause.NOT_FINITE.label} "
"""Beginning of the reason why a cell is missing whose weights or gradients were no longer finite."""


def spec_path(plan: Plan, task: str, kind: str) -> Path:
    """Return the file of a comparison, relative to the root: ``kind`` is ``tuning`` or ``final``."""
    return plan.folder(task) / f"{kind}.yaml"


def results_path(plan: Plan, task: str, kind: str) -> Path:
    """Return the file with the figures of a comparison."""
    return ROOT / plan.folder(task) / kind / "results.json"


def write_spec(plan: Plan, task: str, kind: str, content: Mapping[str, Any]) -> Path:
    """Write the description of a comparison, whole or not at all."""
    path = spec_path(plan, task, kind)
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(ROOT / path, yaml.safe_dump(dict(content), sort_keys=False, width=120))
    return path


def tuning_spec(plan: Plan, task: str) -> dict[str, Any]:
    """Return the comparison of every method with every learning rate, one seed, on the validation set."""
    arms = {
        arm_name(method, rate): _overrides(plan, task, own, rate, ("validation",))
        for method, own in plan.methods.items()
        for rate in plan.learning_rates
    }
    return {**_common(plan, task, "tuning"), "methods": arms, "seeds": [plan.tuning_seed], "baseline": next(iter(arms))}


def final_spec(plan: Plan, task: str, rates: Rates) -> dict[str, Any]:
    """Return the comparison of every method with its learning rate, all seeds, on the held-out sets."""
    own = {**plan.methods, **{name: plan.methods[method] for name, method in plan.copies.items()}}
    chosen = {name: rates[plan.copies.get(name, name)] for name in own}
    tables: dict[str, Any] = {"main": {"methods": list(own)}}
    if task == plan.tasks[0]:
        own |= plan.ablations
        chosen |= dict.fromkeys(plan.ablations, rates[plan.baseline])
        tables |= plan.tables
    arms = {name: _overrides(plan, task, changes, chosen[name], SETS) for name, changes in own.items()}
    return {
        **_common(plan, task, "final"),
        "methods": arms,
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "sets": {"in distribution": [SETS[0]], "out of distribution": list(SETS[1:])},
        "tables": tables,
    }


def arm_name(method: str, rate: float) -> str:
    """Return the name of a method with a learning rate."""
    return f"{method}.lr{rate:g}"


def chosen_rates(plan: Plan, task: str) -> Rates:
    """Return the learning rate of each method: that of the highest accuracy on the validation set, ties to the smaller.

    A run that diverged is behind all others. Without a choice, each method gets the only rate.

    Raises:
        ValueError: a run is missing for another reason, or every run of a method diverged.
    """
    if not plan.is_tuned:
        return dict.fromkeys(plan.methods, plan.learning_rates[0])
    path = results_path(plan, task, "tuning")
    found = json.loads(path.read_text(encoding="utf-8"))
    require_only_diverged(path, found["missing"])
    accuracy = {one["row"]: one["mean"] for one in found["tables"][0]["estimates"] if one["column"] == "validation"}
    rates = {}
    for method in plan.methods:
        known = [rate for rate in sorted(plan.learning_rates) if arm_name(method, rate) in accuracy]
        if not known:
            raise ValueError(f"{path}: {method}: diverged with every learning rate of the plan")
        rates[method] = max(known, key=lambda rate: accuracy[arm_name(method, rate)])
    return rates


def require_only_diverged(path: Path, missing: Mapping[str, str]) -> None:
    """Raise ValueError if a run is missing for another reason than that it diverged."""
    if others := [f"{label}: {why}" for label, why in missing.items() if not why.startswith(DIVERGED)]:
        raise ValueError(f"{path}: {len(others)} runs are missing; the first: {others[0]}")


def _common(plan: Plan, task: str, kind: str) -> dict[str, Any]:
    return {
        "config": plan.config,
        "out": str(plan.folder(task) / kind),
        "smallest_difference": plan.smallest_difference,
        "resamples": plan.resamples,
        "train_command": list(plan.train_command),
        "eval_command": list(plan.eval_command),
    }


def _overrides(plan: Plan, task: str, own: Mapping[str, Any], rate: float, sets: tuple[str, ...]) -> dict[str, Any]:
    folder = plan.folder(task)
    server = f"http://127.0.0.1:{plan.server_port}"
    kept = {"rollout.servers.urls": [server], "rollout.servers.urls_are_restarted": True} if plan.keep_server else {}
    return {
        "run.steps": plan.steps,
        "model.hf_path": str(start_path(folder, TASKS[task])),
        "data.prompts": [str(data_path(folder, "train"))],
        "data.teachers": list(TASKS[task].teachers),
        "eval.sets": {name: {"path": str(data_path(folder, name))} for name in sets},
        "optimizer.lr": rate,
        **kept,
        **plan.overrides,
        **own,
    }
