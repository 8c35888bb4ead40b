"""The figures of one table: estimates of each arm in each column, and differences to its reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from megatron_dypo.study.cells import Arm, arms_of
from megatron_dypo.study.paired import holm, mcnemar_p, permutation_p, wilcoxon_p
from megatron_dypo.study.resampling import Array, Spread, spread
from megatron_dypo.study.scores import ScoreTable
from megatron_dypo.study.spec import Spec, TableSpec

LEVEL = 0.05
"""Largest chance of a false finding in the table as a whole."""
Scores = Mapping[tuple[Arm, str], ScoreTable]
Estimates = Mapping[tuple[Arm, str], "Estimate"]


class Verdict(str, Enum):
    """The finding of a comparison."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "within noise"
    TOO_SMALL = "too small to tell"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: an evaluation set, or the average of a group of sets."""

    name: str
    sets: tuple[str, ...]

    @property
    def is_average(self) -> bool:
        return len(self.sets) > 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The accuracy of an arm in a column."""

    spread: Spread
    seeds: int
    items: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of an arm and its reference, over the seeds and items that both have."""

    spread: Spread
    seeds: int
    items: int
    p_holm: float | None
    """``spread.p``, corrected for all comparisons of the table."""
    p_permutation: float | None
    """Paired permutation test over items, for these runs alone; None for an average of sets."""
    p_wilcoxon: float | None
    p_mcnemar: float | None
    """None unless both have one run with one response to each item."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Result:
    """One table."""

    name: str
    arms: tuple[Arm, ...]
    columns: tuple[Column, ...]
    references: Mapping[Arm, Arm]
    """The arm that each is compared with; the first row and the baseline have none."""
    estimates: Mapping[tuple[Arm, str], Estimate]
    """By arm and name of the column."""
    differences: Mapping[tuple[Arm, str], Difference]
    best: Mapping[str, Arm]
    """Column → the arm that is better than every other arm; absent if the best arms are within noise."""


def columns_of(table: TableSpec, groups: Mapping[str, Sequence[str]]) -> tuple[Column, ...]:
    """Return the columns of a table: the sets of each group, and their average where a group has several."""
    columns = []
    for group, members in groups.items():
        chosen = tuple(name for name in members if not table.sets or name in table.sets)
        columns += [Column(name=name, sets=(name,)) for name in chosen]
        if len(chosen) > 1:
            columns.append(Column(name=group, sets=chosen))
    return tuple(columns)


def make_result(name: str, spec: Spec, groups: Mapping[str, Sequence[str]], scores: Scores) -> Result:
    """Compute one table of a comparison from the available scores."""
    table = spec.tables[name]
    methods = table.methods or tuple(spec.methods)
    arms = tuple(sorted((arm for arm in arms_of(spec) if arm.method in methods), key=lambda a: methods.index(a.method)))
    columns, references = columns_of(table, groups), _references(arms, spec, table)
    estimates = {(arm, c.name): found for arm in arms for c in columns if (found := _estimate(arm, c, scores, spec))}
    pairs = [(arm, references[arm], column) for arm in arms if arm in references for column in columns]
    differences = _differences(pairs, scores, spec)
    best = {column.name: arm for column in columns if (arm := _best(column, estimates, arms, scores, spec))}
    return Result(
        name=name,
        arms=arms,
        columns=columns,
        references=references,
        estimates=estimates,
        differences=differences,
        best=best,
    )


def _references(arms: Sequence[Arm], spec: Spec, table: TableSpec) -> dict[Arm, Arm]:
    """Return the reference of each arm: always an arm on the same data."""
    if table.against == "baseline":
        return {arm: replace(arm, method=spec.baseline) for arm in arms if arm.method != spec.baseline}
    by_data: dict[str | None, list[Arm]] = {}
    for arm in arms:
        by_data.setdefault(arm.data, []).append(arm)
    return {arm: before for same in by_data.values() for before, arm in itertools.pairwise(same)}


def _estimate(arm: Arm, column: Column, scores: Scores, spec: Spec) -> Estimate | None:
    tables = [scores.get((arm, name)) for name in column.sets]
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        return None
    seeds = _common_seeds(known)
    if not seeds:
        return None
    arrays = [table.rows(seeds, table.items) for table in known]
    return Estimate(
        spread=spread(arrays, resamples=spec.resamples),
        seeds=len(seeds),
        items=sum(len(table.items) for table in known),
    )


def _common_seeds(tables: Sequence[ScoreTable]) -> list[int]:
    return [seed for seed in tables[0].seeds if all(seed in table.seeds for table in tables)]


def paired_rows(first: Arm, second: Arm, column: Column, scores: Scores) -> list[tuple[Array, Array]] | None:
    """Return for each set of a column the scores of two arms over the seeds and items that both have."""
    tables = [(scores.get((first, name)), scores.get((second, name))) for name in column.sets]
    known = [(a, b) for a, b in tables if a is not None and b is not None]
    if len(known) < len(tables):
        return None
    seeds = _common_seeds([table for pair in known for table in pair])
    rows = []
    for a, b in known:
        others = set(b.items)
        items = [item for item in a.items if item in others]
        if not seeds or not items:
            return None
        rows.append((a.rows(seeds, items), b.rows(seeds, items)))
    return rows


def _differences(
    pairs: Sequence[tuple[Arm, Arm, Column]], scores: Scores, spec: Spec
) -> dict[tuple[Arm, str], Difference]:
    found = {}
    for arm, reference, column in pairs:
        if rows := paired_rows(arm, reference, column, scores):
            is_single = all(scores[one, name].samples == 1 for one in (arm, reference) for name in column.sets)
            found[arm, column.name] = _difference(rows, spec.resamples, is_single=is_single)
    tested = {key: one for key, one in found.items() if one.spread.p is not None}
    adjusted = dict(zip(tested, holm([one.spread.p or 0.0 for one in tested.values()]), strict=True))
    return {
        key: replace(
            one, p_holm=adjusted.get(key), verdict=_verdict(one.spread, adjusted.get(key), spec.smallest_difference)
        )
        for key, one in found.items()
    }


def _difference(rows: Sequence[tuple[Array, Array]], resamples: int, *, is_single: bool) -> Difference:
    tables = [first - second for first, second in rows]
    num_seeds = len(tables[0])
    items_I = tables[0].mean(axis=0)
    is_one_set = len(tables) == 1 and len(items_I) > 1
    is_mcnemar = is_one_set and is_single and num_seeds == 1
    return Difference(
        spread=spread(tables, least=-1.0, resamples=resamples),
        seeds=num_seeds,
        items=sum(table.shape[1] for table in tables),
        p_holm=None,
        p_permutation=permutation_p(items_I, resamples=resamples) if is_one_set else None,
        p_wilcoxon=wilcoxon_p(items_I) if is_one_set else None,
        p_mcnemar=mcnemar_p(rows[0][0][0], rows[0][1][0]) if is_mcnemar else None,
        verdict=Verdict.TOO_SMALL,
    )


def _verdict(found: Spread, p: float | None, smallest: float) -> Verdict:
    if p is not None and p < LEVEL:
        return Verdict.BETTER if found.mean > 0 else Verdict.WORSE
    could_find = found.detectable is not None and found.detectable <= smallest
    return Verdict.NOISE if could_find else Verdict.TOO_SMALL


def _best(column: Column, estimates: Estimates, arms: Sequence[Arm], scores: Scores, spec: Spec) -> Arm | None:
    """Return the arm that is better than every other one in the column, by tests that are corrected together."""
    known = [arm for arm in arms if (arm, column.name) in estimates]
    if len(known) < 2:
        return None
    first = max(known, key=lambda arm: estimates[arm, column.name].spread.mean)
    p_values = []
    for other in known:
        rows = paired_rows(first, other, column, scores) if other != first else None
        if other != first and rows is None:
            return None
        if rows is not None:
            found = spread([a - b for a, b in rows], least=-1.0, resamples=spec.resamples)
            p_values.append(found.p if found.p is not None and found.mean > 0 else 1.0)
    return first if max(holm(p_values)) < LEVEL else None
