"""``megatron-dypo compare`` with the real commands in its cells: killed in an evaluation, and started again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dypo.eval.records import Record, read_records, records_path
from tests.support.e2e.commands import finished, start, wait_until
from tests.support.e2e.parity_task import write_task

CELLS = ["short/seed-1", "long/seed-1", "short/seed-2", "long/seed-2"]
DEADLINE_S = 2400.0


def write_comparison(folder: Path) -> Path:
    """Write a comparison: two teachers, two seeds, two steps; supervised and greedy, so every run gives the same."""
    held_out = {"held_out": {"path": str(folder / "held_out.jsonl")}}
    rollout = {"prompts_per_round": 8, "max_new_tokens": 12, "max_in_flight": 1}
    sections: dict[str, Any] = {"objective": {"name": "sft"}, "rollout": rollout}
    config = write_task(folder, **sections, eval={"sets": held_out, "temperature": 0})
    spec = {
        "config": str(config),
        "out": str(folder / "out"),
        "methods": {name: {"data.teachers": [name]} for name in ("short", "long")},
        "seeds": [1, 2],
        "baseline": "short",
        "resamples": 399,
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def compare(path: Path) -> str:
    """Run a comparison to its end; return its table."""
    output = finished(start("compare", path), deadline_s=DEADLINE_S)
    table = (path.parent / "out" / "tables" / "main.md").read_text()
    assert table.strip() in output
    return table


@pytest.mark.slow
@pytest.mark.timeout(3 * DEADLINE_S)
def test_a_comparison_that_is_killed_ends_with_the_table_of_one_go_and_trains_and_asks_nothing_twice(
    tmp_path: Path,
) -> None:
    path = write_comparison(tmp_path)
    cells = tmp_path / "out" / "cells"

    def records(cell: str) -> list[Record]:
        return read_records(records_path(cells / cell / "eval", "held_out"))

    def attempt(cell: str) -> str:
        found: str = json.loads((cells / cell / "run" / "status.json").read_text())["attempt"]
        return found

    killed = start("compare", path)
    wait_until(killed, lambda: len(records(CELLS[0])) > 0, DEADLINE_S)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    kept, trained = records(CELLS[0]), attempt(CELLS[0])
    assert not (cells / CELLS[1]).exists()
    table = compare(path)
    assert records(CELLS[0])[: len(kept)] == kept
    assert attempt(CELLS[0]) == trained
    asked = {cell: len(records(cell)) for cell in CELLS}
    assert asked == dict.fromkeys(CELLS, 16)
    assert len({record.correct for cell in CELLS for record in records(cell)}) == 2, "some are right and some are wrong"

    attempts, resumed = {cell: attempt(cell) for cell in CELLS}, records(CELLS[0])
    (cells / CELLS[0]).rename(tmp_path / "resumed")
    assert compare(path) == table
    assert records(CELLS[0]) == resumed
    assert attempt(CELLS[0]) != trained
    assert {cell: attempt(cell) for cell in CELLS[1:]} == {cell: attempts[cell] for cell in CELLS[1:]}
