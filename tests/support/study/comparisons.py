"""Write and run comparisons of fake runs for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_dypo.study.compare import open_comparison
from megatron_dypo.study.run_cells import run_cells
from tests.support.study import fake_program
from tests.support.study.fake_program import beside

ROOT = Path(__file__).resolve().parents[3]
METHODS = {name: {"objective.name": name} for name in ("dypo", "grpo")}


def write_comparison(folder: Path, **changes: Any) -> Path:
    """Write a config and the description of a comparison, whose cells are run by the fake program."""
    sets = {name: {"path": f"{name}.jsonl"} for name in fake_program.SETS}
    config = {
        "run": {"steps": 5},
        "model": {"hf_path": "model"},
        "data": {"prompts": ["train.jsonl"]},
        "eval": {"sets": sets},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    fake = [sys.executable, fake_program.__file__, str(journal(folder))]
    spec = {
        "config": str(folder / "config.yaml"),
        "out": str(folder / "out"),
        "methods": METHODS,
        "seeds": [1, 2],
        "baseline": "grpo",
        "resamples": 399,
        "train_command": [*fake, "train", "{cell}"],
        "eval_command": [*fake, "eval", "{cell}"],
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({**spec, **changes}, sort_keys=False))
    return path


def journal(folder: Path) -> Path:
    return folder / "journal.txt"


def journal_lines(folder: Path) -> list[str]:
    return journal(folder).read_text().splitlines() if journal(folder).exists() else []


def tell(folder: Path, kind: str, cell: str, text: str = "") -> Path:
    """Tell the fake program to ``hold`` or ``fail`` in a cell; return the file whose removal takes the order back."""
    path = beside(journal(folder), kind, cell)
    path.write_text(text)
    return path


def run_here(path: Path, numbers: list[int] | None = None) -> tuple[list[str], str]:
    """Run a comparison in this process; return the ends of cells that are not done, and the table."""
    comparison = open_comparison(path)
    cells = [comparison.cells[number] for number in numbers] if numbers else comparison.cells
    left = run_cells(cells, comparison.spec, comparison.sets, say=lambda _: None)
    return [str(end) for end in left], comparison.write()


def start_compare(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_dypo.cli", "compare", str(path), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def compare(path: Path, *options: str, status: int = 0) -> tuple[str, str]:
    """Run ``megatron-dypo compare`` to its end, which must have this status; return what it printed."""
    process = start_compare(path, *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out, err


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 120.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.02)
