"""NeMo-Run: submitted scripts equal the golden files, and the commands of its page can be called."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.golden.render_nemo_run import DRY_RUNS, FOLDER, render
from tests.support.nemo_run import REPOSITORY, dypo, nemo_run_python

PAGE = (REPOSITORY / "docs" / "nemo_run.md").read_text(encoding="utf-8")
CALL = ".venv-nemo-run/bin/python examples/nemo_run/dypo.py "


@pytest.fixture(scope="module")
def python() -> Path:
    return nemo_run_python()


def documented_calls() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix(CALL) for line in lines if line.startswith(CALL)]


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_recipe_becomes_the_job_of_its_golden_file(python: Path, name: str) -> None:
    assert render(name) == (FOLDER / name).read_text(), (
        "python -m tests.golden.render_nemo_run writes it; read the diff"
    )


def test_the_page_has_calls_of_both_executors() -> None:
    assert len(documented_calls()) >= 4
    assert {"run.executor=slurm" in call for call in documented_calls()} == {True, False}


@pytest.mark.parametrize("call", documented_calls())
def test_a_documented_call_passes_a_dry_run(python: Path, tmp_path: Path, call: str) -> None:
    done = dypo(python, tmp_path, "--dryrun", *shlex.split(call, comments=True))
    assert done.returncode == 0, done.stdout
    assert "=== APPLICATION ===" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.objective.nmae=grpo", "No parameter named 'nmae' exists"),
        ("model.optimizer.lr=-1", "lr=-1.0: must be positive"),
        ("model.optimizer.lr=fast", "Input should be a valid number"),
        ("model.parallel.virtual_pipeline=2", "virtual_pipeline=2: needs pipeline > 1"),
        ("run.executor.nodes=3", "run.executor.nodes=3: set model.trainer_nodes and model.rollout_nodes"),
        ("home=/home/nemo_run", "home=/home/nemo_run, venv=/v: must not contain /nemo_run"),
    ],
)
def test_a_mistake_is_named_before_anything_is_submitted(
    python: Path, tmp_path: Path, argument: str, message: str
) -> None:
    done = dypo(python, tmp_path, "--dryrun", "run.executor=slurm", "model=qwen2_5_math_7b", "venv=/v", argument)
    assert message in done.stdout
    assert "=== APPLICATION ===" not in done.stdout
