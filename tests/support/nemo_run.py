"""Run NeMo-Run for tests, in an environment of its own, as its users do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "examples" / "nemo_run" / "dypo.py"
_PYTHON = REPOSITORY / ".venv-nemo-run" / "bin" / "python"


def nemo_run_python() -> Path:
    """Return the interpreter. If it is missing, make it if ``DYPO_REQUIRE_NEMO_RUN`` is set, else skip the test."""
    required = os.environ.get("DYPO_REQUIRE_NEMO_RUN")
    question = [] if required else ["--question"]
    made = subprocess.run(["make", *question, "setup-nemo-run"], cwd=REPOSITORY, capture_output=True, text=True)
    if made.returncode and required:
        pytest.fail(f"make setup-nemo-run: {made.stdout}{made.stderr}")
    if made.returncode:
        pytest.skip("needs make setup-nemo-run, which downloads 540 MB")
    return _PYTHON


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a call: NeMo-Run writes its files under ``home``, and its lines do not wrap."""
    return {**os.environ, "NEMORUN_HOME": str(home), "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}


def dypo(python: Path, home: Path, *arguments: str, deadline_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run ``examples/nemo_run/dypo.py``; its error stream is part of its output."""
    return subprocess.run(
        [python, PROGRAM, *arguments],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=deadline_s,
        check=False,
    )
