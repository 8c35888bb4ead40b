"""The verdict of a soak over its two runs: each kind of trouble, in either run, is told and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.ending import Cause
from tests.support.soak_cases import GOOD, last_changed, life
from tools.soak import CALM, FAULTS, judge
from tools.soak_parts.faults import DAMAGE
from tools.soak_parts.invariants import VERSION
from tools.soak_parts.soak import Event, Story

ROOT = Path(__file__).resolve().parents[3]
EVALUATED: dict[str, Any] = {
    "eval/heldout/accuracy": 0.5,
    "eval/heldout/accuracy_low": 0.4,
    "eval/heldout/accuracy_high": 0.6,
}
LONG = life([100] * 601)


def verdict(
    tmp_path: Path, records: dict[str, list[dict[str, Any]]], stories: dict[str, Story], *, log: str = ""
) -> dict[str, Any]:
    """Judge two runs, whose records are good unless others are given."""
    folders = {name: tmp_path / name for name in (CALM, FAULTS)}
    for name, folder in folders.items():
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "rank_00000.log").write_text(log)
        shutil.copy(ROOT / "examples/quickstart/dypo.yaml", folder / "config.yaml")
        lines = [{**record, **EVALUATED, "time": 0.0} for record in records.get(name, GOOD)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return judge(folders, stories, max_gap=1e-3, max_growth=0.02, max_more=8)


def stories(**fields: Any) -> dict[str, Story]:
    """Return the stories of two good runs; ``fields`` are those of the one under faults."""
    ends = [Cause.STOPPED.status]
    return {CALM: Story(ends=ends, samples=LONG), FAULTS: Story(**{"ends": ends, "samples": LONG, **fields})}


def test_two_good_runs_break_no_law(tmp_path: Path) -> None:
    found = verdict(tmp_path, {}, stories())
    assert found["broken"] == []
    assert found["growth"][FAULTS]["rank 0"]["measured"] == {"rss": 1, "descriptors": 1, "threads": 1}
    assert found["growth"][FAULTS]["rank 0"]["longest_s"] == 1200.0
    assert found["accuracy"]["step"] == 5


@pytest.mark.parametrize("name", [CALM, FAULTS])
def test_a_law_of_the_records_holds_in_both_runs(tmp_path: Path, name: str) -> None:
    found = verdict(tmp_path, {name: last_changed(**{VERSION: 3.0})}, stories())
    assert found["broken"] == [f"{name}: step 5: {VERSION}=3, not from 4 to 4"]


def test_a_run_without_a_record_is_told(tmp_path: Path) -> None:
    assert "faults: no step is on record" in verdict(tmp_path, {FAULTS: []}, stories())["broken"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ends": [Cause.STOPPED.status, Cause.SERVERS_GONE.status]}, "faults: did not end well: status"),
        ({"left_behind": ["start 1: python"]}, "faults: left behind by start 1: python"),
        ({"samples": life([100] * 450 + [110] * 151)}, "faults: rank 0: memory grew by 10.0%"),
        ({"samples": LONG + life([100] * 20, role="server")}, "server: rss was not measured: no process lived for 360"),
    ],
)
def test_each_trouble_of_the_run_under_faults_is_told(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    line, *others = verdict(tmp_path, {}, stories(**fields))["broken"]
    assert line.startswith(words)
    assert all("not measured" in other for other in others)


def test_damage_that_the_run_never_named_is_told(tmp_path: Path) -> None:
    flip = Event(kind=DAMAGE, words="bit 1 of byte 2 of step_000020/x", time=0.0, start=1, step=21)
    log = "2026-11-27 12:00:00+0000 I megatron_dypo: resuming from /a/step_000020: 20 of 90 steps are done\n"
    found = verdict(tmp_path, {}, stories(events=[flip]), log=log)
    assert found["broken"] == found["flips"]["silent"]
    assert len(found["broken"]) == 1
