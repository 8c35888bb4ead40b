"""Checkpoints of `megatron-dypo train` become HF folders by every way there is, and the last one is the run's own ``hf/``."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from tests.support.e2e.parity_task import write_task

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = {
    "two stages, distributed optimizer": {
        "parallel": {"pipeline": 2, "num_processes": 2},
        "optimizer": {"lr": 1e-3, "distributed": True},
        "model": {"dtype": "bfloat16"},
    },
    "refreshed reference": {"objective": {"name": "sft", "reference": {"mode": "refreshed"}}},
}


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_folder(expected, actual):
    names = sorted(file.name for file in expected.iterdir())
    same, _, _ = filecmp.cmpfiles(expected, actual, names, shallow=False)
    return same == names == sorted(file.name for file in actual.iterdir())


@pytest.mark.parametrize(
    "layout", [n if n.startswith("two") else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_every_checkpoint_of_a_real_run_is_exported(layout, tmp_path):
    sections = {"objective": {"name": "sft"}, **LAYOUTS[layout]}
    config = write_task(tmp_path, run={"steps": 2}, **sections)
    command("-m", "megatron_dypo.cli", "train", config)
    run = tmp_path / "run"
    printed = command("-m", "megatron_dypo.cli", "export", run)
    assert printed.strip() == str(run / "exports" / "step_000002")
    assert same_folder(run / "hf", run / "exports" / "step_000002")
    tool = REPOSITORY / "tools" / "convert_mcore_to_hf.py"
    command(tool, "--mcore-path", run / "checkpoints" / "step_000002", "--hf-path", tmp_path / "step_000002")
    mcore_to_hf(run / "checkpoints" / "step_000001", tmp_path / "step_000001", show_progress=False)
    assert same_folder(run / "hf", tmp_path / "step_000002")
    assert not same_folder(run / "hf", tmp_path / "step_000001")
