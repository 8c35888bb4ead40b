"""All estimates of a probe as plain numbers, and as text for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from megatron_dypo.checks import require
from megatron_dypo.metrics.probe_files import FORMAT, describe_cost
from megatron_dypo.probe.assumptions import judge
from megatron_dypo.probe.gate import estimate_gate, hard_gate, mid_gate
from megatron_dypo.probe.gradients import Groups, Setting, make_groups
from megatron_dypo.probe.margins import estimate_margins
from megatron_dypo.probe.mixing import estimate_moments
from megatron_dypo.probe.moments import make_products
from megatron_dypo.probe.resample import Tree, estimate, jackknife_weights, ratio, to_plain
from megatron_dypo.probe.scores import Scores
from megatron_dypo.probe.sensitivity import estimate_sensitivity
from megatron_dypo.probe.shares import estimate_shares
from megatron_dypo.probe.teachers import estimate_teachers, teacher_errors


def analyse(
    scores: Scores,
    setting: Setting,
    alpha: float,
    *,
    target: str | None = None,
    seed: int = 0,
    is_projected: bool = True,
) -> dict[str, Any]:
    """Compute every estimate.

    Args:
        alpha: the configured α of the mix.
        target: the teacher whose traces are the right answer's own data; None: the mean of all teachers.
        seed: of the jackknife's blocks, where there are many prompts.
        is_projected: whether the scores are projections, which have an error, or whole gradients.

    Returns:
        Only dicts, lists, numbers, texts and None, as JSON has them. An estimate has ``value``, ``low`` and ``high``.

    Raises:
        ValueError: α is not in [0, 1]; the reference or the target is unknown.
    """
    require(0 <= alpha <= 1, f"alpha={alpha}", "must be in [0, 1]")
    groups = make_groups(scores, setting)
    products = make_products(scores, groups)
    moments = {scope: estimate_moments(products, alpha, scope, seed=seed) for scope in ("all", "mid")}
    gates = {
        "hard_sft": estimate_gate(hard_gate(scores, setting, groups), seed=seed),
        "mid_grpo": estimate_gate(mid_gate(products, "grpo"), seed=seed),
        "mid_gal": estimate_gate(mid_gate(products, "gal"), seed=seed),
    }
    margins = estimate_margins(scores, setting, seed=seed)
    teachers = estimate_teachers(teacher_errors(scores, setting, target), seed=seed)
    assumptions = judge(moments["mid"], cast(Any, margins[setting.reference]), gates, teachers)
    found: Tree = {
        **_facts(scores, setting, alpha, target),
        "projection_error": float(np.sqrt(2 / scores.score_Nd.shape[1])) if is_projected else 0.0,
        "assumptions": [cast(Tree, dataclasses.asdict(one)) for one in assumptions],
        "tiers": _tiers(groups, seed),
        "moments": moments,
        "margins": margins,
        "gate": gates,
        "shares": estimate_shares(scores, groups, seed=seed),
        "teachers": teachers,
        "sensitivity": estimate_sensitivity(scores, setting, alpha, seed=seed),
    }
    return cast(dict[str, Any], to_plain(found))


def _facts(scores: Scores, setting: Setting, alpha: float, target: str | None) -> Tree:
    return {
        "format": FORMAT,
        "step": scores.step,
        "prompts": len(scores.prompt_ids),
        "rollouts": int((scores.teacher_N < 0).sum()),
        "traces": int((scores.teacher_N >= 0).sum()),
        "dimensions": scores.score_Nd.shape[1],
        "setting": dataclasses.asdict(setting),
        "alpha": alpha,
        "target": target,
    }


def _tiers(groups: Groups, seed: int) -> Tree:
    """Return the shares of the tiers, of all groups."""
    weight_BP = jackknife_weights(groups.num_prompts, seed)
    count_P = groups.is_group_PR.sum(axis=1)
    mid_P, hard_P = groups.is_mid_PR.sum(axis=1), groups.is_hard_PR.sum(axis=1)
    sums = {"mid": mid_P, "hard": hard_P, "easy": count_P - mid_P - hard_P}
    informative = int((count_P > 0).sum())
    return {
        name: estimate(ratio(weight_BP @ sum_P, weight_BP @ count_P), informative=informative, least=0.0, largest=1.0)
        for name, sum_P in sums.items()
    }


def text(result: Mapping[str, Any]) -> str:
    """Return the result as text: the assumptions, then the figures with their 95% intervals.

    The second line is what the probe took, if the result has a ``cost``: :func:`analyse` alone does not measure one.
    """
    head = (
        f"probe of step {result['step']}: {result['prompts']} prompts, {result['rollouts']} rollouts in groups of "
        f"{result['setting']['group_size']}, {result['traces']} traces, {result['dimensions']} dimensions"
    )
    lines = [head, *([f"cost: {describe_cost(result['cost'])}"] if "cost" in result else [])]
    lines += ["", "Assumptions of the paper"]
    for one in result["assumptions"]:
        lines += [
            f"  {one['verdict'].upper():<14}  {one['claim']}",
            f"{'':18}{_number(one['estimate']['value'])}; {one['why']}",
        ]
    lines += ["", "Figures (95% intervals)"]
    for part in ("tiers", "moments", "margins", "gate", "shares", "teachers"):
        rows = list(_rows(result[part] or {}, part))
        lines += [f"  {name:<58}  {words}" for name, words in rows]
    return "\n".join([*lines, "", "Dependence on the setting", *_table(result["sensitivity"]), ""])


def _rows(tree: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        path = f"{name}.{key}"
        if key == "grid":  # a curve, for plots
            continue
        if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
            yield path, _interval(value)
        elif isinstance(value, Mapping):
            yield from _rows(value, path)
        elif isinstance(value, list):
            for one in value:
                first, *others = one.items()
                yield from _rows(dict(others), f"{path}[{first[0]}={first[1]}]")
        else:
            yield path, _number(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    figures = [key for key in rows[0] if key not in ("key", "value")] if rows else []
    lines = [("setting", *figures)]
    for row in rows:
        cells = (row[name]["value"] if isinstance(row[name], Mapping) else row[name] for name in figures)
        lines.append((f"{row['key']}={row['value']}", *map(_number, cells)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]


def _interval(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{_number(one['value'])} (no interval)"
    return f"{_number(one['value'])} ({_number(one['low'])} to {_number(one['high'])})"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)
