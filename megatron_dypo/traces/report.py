"""Figures of teachers: responses asked and right, cost, lengths of traces, and agreement between teachers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.traces.ledger import Ledger
from megatron_dypo.traces.tasks import Tasks

_QUANTILES = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
_MILLION = 1e6


def trace_report(tasks: Tasks, ledgers: Mapping[str, Ledger], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of all teachers, for JSON.

    Args:
        left_out: teacher → traces that were left out because another teacher has the same text.
    """
    served = {name: ledger.has_trace for name, ledger in ledgers.items()}
    num_servers = np.sum(list(served.values()), axis=0)
    teachers = {
        name: {
            **asdict(ledger.counts),
            "same_as_another_teachers": left_out[name],
            "cost": cost(ledger),
            "prompts": int(np.count_nonzero(ledger.was_asked)),
            "prompts_with_trace": int(np.count_nonzero(served[name])),
            "prompts_alone": int(np.count_nonzero(served[name] & (num_servers == 1))),
            "prompts_left": ledger.num_left,
            "kept": len(ledger.kept_lengths),
            "kept_tokens": _distribution(ledger.kept_lengths),
        }
        for name, ledger in ledgers.items()
    }
    pairs = [_agreement(a, b) for a, b in itertools.combinations(ledgers.values(), 2)]
    return {
        "rows": len(tasks.source),
        "prompts": len(tasks),
        "prompts_with_trace": int(np.count_nonzero(num_servers)),
        "teachers": teachers,
        "agreement": pairs,
    }


def cost(ledger: Ledger) -> float:
    """Return the price of all recorded requests of a teacher."""
    counts, cfg = ledger.counts, ledger.cfg
    return (counts.num_prompt_tokens * cfg.price_in + counts.num_tokens * cfg.price_out) / _MILLION


def _distribution(lengths: npt.NDArray[np.int32]) -> dict[str, float] | None:
    if not len(lengths):
        return None
    return {
        **{name: float(np.percentile(lengths, rank)) for name, rank in _QUANTILES.items()},
        "mean": float(np.mean(lengths)),
    }


def _agreement(one: Ledger, other: Ledger) -> dict[str, Any]:
    """Count the prompts that two teachers were both asked, by who got them right in at least one response."""
    both = one.was_asked & other.was_asked
    a, b = one.has_trace[both], other.has_trace[both]
    return {
        "teachers": [one.name, other.name],
        "prompts": len(a),
        "both_right": int(np.count_nonzero(a & b)),
        "only_first": int(np.count_nonzero(a & ~b)),
        "only_second": int(np.count_nonzero(~a & b)),
        "neither": int(np.count_nonzero(~a & ~b)),
        "agree": float(np.mean(a == b)) if len(a) else None,
    }


def to_text(report: Mapping[str, Any]) -> str:
    """Return the report as text for people."""
    lines = [
        f"{report['prompts_with_trace']} of {report['prompts']} different prompts have a trace ({report['rows']} rows)"
    ]
    for name, one in report["teachers"].items():
        lines += ["", *_teacher_lines(name, one)]
    if report["agreement"]:
        lines += ["", "teachers asked about the same prompts: both right, only the first, only the second, neither"]
    for pair in report["agreement"]:
        agree = "-" if pair["agree"] is None else f"{100 * pair['agree']:.1f}% agree"
        figures = ", ".join(str(pair[key]) for key in ("both_right", "only_first", "only_second", "neither"))
        lines.append(f"  {' and '.join(pair['teachers'])}: {figures} of {pair['prompts']}; {agree}")
    return "\n".join(lines)


def _teacher_lines(name: str, one: Mapping[str, Any]) -> list[str]:
    share = f" ({100 * one['right'] / one['asked']:.1f}%)" if one["asked"] else ""
    lines = [
        f"{name}: {one['asked']} responses asked, {one['right']} right{share}, {one['wrong']} wrong, "
        f"{one['truncated']} cut at the limit, {one['no_verdict']} without a verdict, {one['refused']} refused",
        f"  kept {one['kept']}; duplicates {one['duplicates']} of its own, "
        f"{one['same_as_another_teachers']} of another teacher's",
        f"  prompts: {one['prompts']} asked, {one['prompts_with_trace']} with a trace, "
        f"{one['prompts_alone']} that no other teacher serves, {one['prompts_left']} left",
        f"  tokens: {one['num_prompt_tokens']} of prompts, {one['num_tokens']} of responses; cost {one['cost']:.2f}",
    ]
    if one["kept_tokens"]:
        shown = ", ".join(f"{key} {value:.0f}" for key, value in one["kept_tokens"].items())
        lines.append(f"  tokens of a trace: {shown}")
    return lines
