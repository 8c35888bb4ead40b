"""Fuzz rows, configs, server answers, tokenizers and HF folders for a while, one seed after the other.

    python -m tests.fuzz --minutes 30

runs the long fuzz tests (marked ``slow``) under seed after seed and adds a line for each to ``tests/fuzz_seeds.txt``. A
seed that failed is run again by ``python -m tests.fuzz --seed N``; what it finds becomes a test of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
SEEDS = Path(__file__).with_name("fuzz_seeds.txt")
TARGETS = {
    "configs": "tests/unit/config/test_config_nonsense.py",
    "rows and prompt files": "tests/unit/data/test_row_fuzz.py",
    "tokenizers and templates": "tests/unit/data/test_tokenizer_fuzz.py",
    "server answers": "tests/unit/rollout/test_group_answers.py",
    "HF folders": "tests/unit/config/test_config_fuzz.py",
    "answers of responses": "tests/unit/grading/test_answer_laws.py",
}


def run_seed(seed: int) -> list[str]:
    """Run every target under a seed; return the names of those that failed."""
    failed = []
    for name, path in TARGETS.items():
        command = [sys.executable, "-m", "pytest", path, "-m", "slow", "-q", "--timeout", "1800"]
        command += ["--hypothesis-seed", str(seed), "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 5):  # 5: no test was selected
            print(done.stdout[-4000:], file=sys.stderr)
            failed.append(name)
    return failed


def main(
    minutes: Annotated[float, typer.Option(help="Time after which no further seed is begun.")] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Run this seed alone.")] = None,
) -> None:
    """Fuzz until the time is over, or with one seed."""
    if seed is not None:
        raise typer.Exit(1 if run_seed(seed) else 0)
    start, next_seed = time.monotonic(), 1 + len(SEEDS.read_text().splitlines() if SEEDS.exists() else [])
    while time.monotonic() - start < 60 * minutes:
        begun = time.monotonic()
        failed = run_seed(next_seed)
        seconds = time.monotonic() - begun
        found = f"failed: {', '.join(failed)}" if failed else "nothing found"
        line = f"seed {next_seed}, {date.today()}, {seconds:.0f} s: {found}"
        print(line, flush=True)
        with SEEDS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        next_seed += 1


if __name__ == "__main__":
    typer.run(main)
