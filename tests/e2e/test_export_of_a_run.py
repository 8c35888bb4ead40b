"""Checkpoints of `megatron-dypo train` become HF folders in every way, and the last one is the run's own ``hf/``."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from tests.support.e2e.commands import REPOSITORY, python, train
from tests.support.e2e.parity_task import write_task

LAYOUTS: dict[str, dict[str, Any]] = {
    "two stages, distributed optimizer": {
        "parallel": {"pipeline": 2, "num_processes": 2},
        "optimizer": {"lr": 1e-3, "distributed": True},
        "model": {"dtype": "bfloat16"},
    },
    "refreshed reference": {"objective": {"name": "sft", "reference": {"mode": "refreshed"}}},
}


def same_folder(expected: Path, actual: Path) -> bool:
    names = sorted(file.name for file in expected.iterdir())
    same, _, _ = filecmp.cmpfiles(expected, actual, names, shallow=False)
    return same == names == sorted(file.name for file in actual.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_of_a_real_run_is_exported(layout: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"objective": {"name": "sft"}, **LAYOUTS[layout]}
    config = write_task(tmp_path, run={"steps": 2}, **sections)
    train(config)
    run = tmp_path / "run"
    printed = python("-m", "megatron_dypo.cli", "export", run)
    assert printed.strip() == str(run / "exports" / "step_000002")
    assert same_folder(run / "hf", run / "exports" / "step_000002")
    tool = REPOSITORY / "tools" / "convert_mcore_to_hf.py"
    python(tool, "--mcore-path", run / "checkpoints" / "step_000002", "--hf-path", tmp_path / "step_000002")
    mcore_to_hf(run / "checkpoints" / "step_000001", tmp_path / "step_000001", show_progress=False)
    assert same_folder(run / "hf", tmp_path / "step_000002")
    assert not same_folder(run / "hf", tmp_path / "step_000001")
