"""Tables of scores from the records of the cells: seeds × items for each arm and evaluation set.

Suffixes: K seeds, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dypo.eval.estimators import pass_at_k
from megatron_dypo.eval.records import Record, read_records, records_path
from megatron_dypo.study.cells import Arm, Cell
from megatron_dypo.study.resampling import Array


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """The scores of one cell on one evaluation set."""

    by_item: Mapping[str, float]
    """Item → pass@k over its responses with a verdict; an item with fewer than k of them is absent."""
    items: frozenset[str]
    """All items that have a response."""
    samples: int
    """Most responses with a verdict to one item."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """The scores of one arm on one evaluation set."""

    seeds: tuple[int, ...]
    items: tuple[str, ...]
    scores_KI: Array
    """pass@k of each item under each seed, for the items that have it under every seed."""
    left_out: int
    """Items with a response in some cell of the comparison, that lack it under some seed of this arm."""
    samples: int

    def rows(self, seeds: Sequence[int], items: Sequence[str]) -> Array:
        """Return the part of the table with these seeds and items."""
        seed_at = {seed: row for row, seed in enumerate(self.seeds)}
        item_at = {item: column for column, item in enumerate(self.items)}
        return self.scores_KI[np.ix_([seed_at[s] for s in seeds], [item_at[i] for i in items])]


def score_cell(records: Sequence[Record], k: int) -> CellScores:
    """Return pass@k of each item of one evaluation set."""
    counts: dict[str, list[int]] = {}
    for record in records:
        count = counts.setdefault(record.item, [0, 0])
        count[0] += record.correct is not None
        count[1] += record.correct is True
    return CellScores(
        by_item={item: pass_at_k(n, c, k) for item, (n, c) in counts.items() if n >= k},
        items=frozenset(counts),
        samples=max((n for n, _ in counts.values()), default=0),
    )


def score_table(cells: Mapping[int, CellScores], others: frozenset[str] = frozenset()) -> ScoreTable | None:
    """Join the cells of an arm by seed; None without a cell, or without an item that all of them have.

    Args:
        others: items of the set that are known from other arms.
    """
    if not cells:
        return None
    seeds = tuple(cells)
    common = sorted(frozenset.intersection(*(frozenset(cells[seed].by_item) for seed in seeds)))
    if not common:
        return None
    known = others.union(*(cells[seed].items for seed in seeds))
    scores = np.array([[cells[seed].by_item[item] for item in common] for seed in seeds], dtype=np.float64)
    return ScoreTable(
        seeds=seeds,
        items=tuple(common),
        scores_KI=scores,
        left_out=len(known) - len(common),
        samples=max(cell.samples for cell in cells.values()),
    )


def read_scores(cells: Sequence[Cell], sets: Sequence[str], k: int) -> dict[tuple[Arm, str], ScoreTable]:
    """Read the records of the cells that are done, and return the table of each arm and set that has one."""
    found: dict[tuple[Arm, str], dict[int, CellScores]] = {}
    for cell in cells:
        for name in sets if cell.is_done() else ():
            scores = score_cell(read_records(records_path(cell.eval_dir, name)), k)
            found.setdefault((cell.arm, name), {})[cell.seed] = scores
    known = {
        name: frozenset[str]().union(
            *(one.items for key, cells in found.items() if key[1] == name for one in cells.values())
        )
        for name in sets
    }
    tables = {key: score_table(by_seed, known[key[1]]) for key, by_seed in found.items()}
    return {key: table for key, table in tables.items() if table is not None}
