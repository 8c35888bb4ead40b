"""The tables of a comparison as grids of texts with notes, independent of the output format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.study.cells import Arm, Cell
from megatron_dypo.study.results import LEVEL, Difference, Result, Scores, Verdict

MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOISE: "≈", Verdict.TOO_SMALL: "?"}
_ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One field of a grid."""

    text: str
    small: str = ""
    """Deviation and interval, shown after the text."""
    mark: str = ""
    is_bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of words."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...]
    """Sentences below the table."""


def main_grid(result: Result, missing: Sequence[tuple[Cell, str]], scores: Scores, *, pass_at: int = 1) -> Grid:
    """Return the table of accuracies: a row for each arm, a column for each set and average.

    Args:
        missing: the cells that have no result, with the reason.
        pass_at: k of the pass@k that the scores are.
    """
    rows = tuple(
        (Entry(text=arm.label), *(_entry(result, arm, column.name) for column in result.columns)) for arm in result.arms
    )
    header = ("", *(column.name for column in result.columns))
    notes = (*_legend(result, pass_at), *_fewer_seeds(result), *_left_out(result, scores), *_missing(result, missing))
    return Grid(name=result.name, header=header, rows=rows, notes=notes)


def differences_grid(result: Result) -> Grid:
    """Return the table of differences: a row for each comparison, with its tests."""
    tests = ("p", "p, Holm", "permutation", "Wilcoxon", "McNemar")
    header = ("compared", "on", "difference", *tests, "seeds × items", "could find", "verdict")
    rows = tuple(
        _difference_row(
            f"{arm.label} − {result.references[arm].label}", column.name, result.differences[arm, column.name]
        )
        for arm in result.arms
        for column in result.columns
        if (arm, column.name) in result.differences
    )
    notes = (
        "Differences are of matched seeds and items. The interval and p are over seeds and items (of items alone with "
        f"one seed), p by Holm over the {len(rows)} comparisons of the table, and this one decides.",
        "Permutation, Wilcoxon and McNemar: over the items, for these very runs; other seeds may differ. McNemar: one "
        "run, one response to each item.",
        "Could find: the true difference that such a sample finds in four cases of five.",
    )
    return Grid(name=f"{result.name}: differences", header=header, rows=rows, notes=notes)


def _entry(result: Result, arm: Arm, column: str) -> Entry:
    estimate, difference = result.estimates.get((arm, column)), result.differences.get((arm, column))
    if estimate is None:
        return Entry(text=_ABSENT)
    found = estimate.spread
    deviation = f"± {100 * found.sd:.1f}" if found.sd is not None else ""
    interval = (
        f"[{100 * found.low:.1f}, {100 * found.high:.1f}]" if found.low is not None and found.high is not None else ""
    )
    return Entry(
        text=f"{100 * found.mean:.1f}",
        small=" ".join(part for part in (deviation, interval) if part),
        mark=MARKS[difference.verdict] if difference is not None else "",
        is_bold=result.best.get(column) == arm,
    )


def _difference_row(compared: str, column: str, one: Difference) -> tuple[Entry, ...]:
    found = one.spread
    interval = (
        f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]" if found.low is not None and found.high is not None else ""
    )
    shown = Entry(text=f"{100 * found.mean:+.1f}", small=interval)
    tests = [_p(p) for p in (found.p, one.p_holm, one.p_permutation, one.p_wilcoxon, one.p_mcnemar)]
    could_find = _ABSENT if found.detectable is None else f"{100 * found.detectable:.1f}"
    words = [*tests, f"{one.seeds} × {one.items}", could_find, f"{MARKS[one.verdict]} {one.verdict.value}"]
    return (Entry(text=compared), Entry(text=column), shown, *(Entry(text=word) for word in words))


def _p(value: float | None) -> str:
    if value is None:
        return _ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _legend(result: Result, pass_at: int) -> list[str]:
    seeds = {one.seeds for one in result.estimates.values()}
    what = "Percent correct" if pass_at == 1 else f"pass@{pass_at} in percent"
    if seeds == {1}:
        lines = [f"{what}, one seed [95% interval over items]. One seed says nothing about other seeds."]
    else:
        lines = [f"{what}: mean over seeds ± their standard deviation [95% interval over seeds and items]."]
    if result.references:
        against = {reference.method for reference in result.references.values()}
        whom = next(iter(against)) if len(against) == 1 else "the row above"
        lines.append(
            f"Against {whom}: ▲ better, ▼ worse (p < {LEVEL:g}, corrected for the comparisons of the table), ≈ within "
            "noise, ? too small a sample to tell."
        )
    lines.append("Bold: better than every other row. A column without bold has no such row: the best are within noise.")
    return lines


def _fewer_seeds(result: Result) -> list[str]:
    most = max((one.seeds for one in result.estimates.values()), default=0)
    fewer = {(arm.label, one.seeds) for (arm, _), one in result.estimates.items() if one.seeds < most}
    return [f"{label}: {seeds} of {most} seeds only." for label, seeds in sorted(fewer)]


def _left_out(result: Result, scores: Scores) -> list[str]:
    names = dict.fromkeys(name for column in result.columns for name in column.sets)
    return [
        f"{arm.label} on {name}: {scores[arm, name].left_out} of "
        f"{scores[arm, name].left_out + len(scores[arm, name].items)} items left out: some seed has no verdict on them."
        for arm in result.arms
        for name in names
        if (arm, name) in scores and scores[arm, name].left_out
    ]


def _missing(result: Result, missing: Sequence[tuple[Cell, str]]) -> Sequence[str]:
    arms = {*result.arms, *result.references.values()}
    return [f"Missing: {cell.label}: {why}." for cell, why in missing if cell.arm in arms]
