"""The modes of everything that the commands of a run write: only its user can read it, unless the config shares it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.e2e.commands import REPOSITORY, python, train
from tests.support.e2e.parity_task import write_task
from tests.support.fake_control import KEY
from tests.support.faults.policy_server import policy_servers

UMASK = 0o022
"""Everybody may read what a process writes."""
PARTS = {
    *("config.yaml", "metrics.jsonl", "status.json", "versions.json", "report.html", "checkpoints", "data_check"),
    *("exports", "heartbeats", "hf", "journal", "logs", "refit", "samples", "tensorboard"),
}
"""Files and folders of a run folder without which the test would show little."""


@pytest.fixture(autouse=True)
def _readable_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    os.umask(UMASK)
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", KEY)


def modes_below(folder: Path) -> dict[str, int]:
    """Return path → mode for the folder and everything in it."""
    found = [folder, *(Path(top) / name for top, folders, files in os.walk(folder) for name in folders + files)]
    return {str(path.relative_to(folder.parent)): stat.S_IMODE(path.lstat().st_mode) for path in found}


def write_run(folder: Path, ranks: int, urls: list[str], *, shared: bool) -> Path:
    return write_task(
        folder,
        run={"steps": 2, "dir": str(folder / "runs" / "mine"), "shared_files": shared},
        rollout={"servers": {"urls": urls}},
        refit={"transport": "disk"},
        parallel={"num_processes": ranks},
        checkpoint={"every": 1},
        logging={"tensorboard": True},
        eval={"sets": {"held_out": {"path": str(folder / "held_out.jsonl"), "max_prompts": 4}}},
    )


def run_all(folder: Path, ranks: int, *, shared: bool) -> dict[str, int]:
    """Train, export, evaluate and report; return the modes of everything that these commands made."""
    run_dir, sets = folder / "runs" / "mine", folder / "sets.yaml"
    with policy_servers(1, model_path=str(folder / "model")) as servers:
        config = write_run(folder, ranks, [servers[0].url], shared=shared)
        launcher = ("-m", "megatron_dypo.launch.torchrun", "--standalone", f"--nproc-per-node={ranks}")
        python(*(launcher if ranks > 1 else ()), "-m", "megatron_dypo.cli", "train", config)
        tree = yaml.safe_load(config.read_text())
        kept: dict[str, Any] = {name: tree[name] for name in ("rollout", "grading", "eval")}
        kept["rollout"].pop("servers")
        sets.write_text(yaml.safe_dump({**kept, "data": {"chat_template": False}, "shared_files": shared}))
        evaluate = ("eval", run_dir, "--sets", sets, "--out", folder / "evaluated", "--url", servers[0].url)
        for command in (evaluate, ("export", run_dir, "--step", 1), ("report", run_dir)):
            python("-m", "megatron_dypo.cli", *command)
    tool = REPOSITORY / "tools" / "convert_mcore_to_hf.py"
    python(tool, "--mcore-path", run_dir / "checkpoints" / "step_000002", "--hf-path", folder / "converted")
    assert {path.name for path in run_dir.iterdir()} >= PARTS
    made = [folder / name for name in ("runs", "evaluated", "converted")]
    return {path: mode for one in made for path, mode in modes_below(one).items()}


def test_nobody_else_can_read_what_the_commands_of_a_run_write(tmp_path: Path) -> None:
    found = run_all(tmp_path, 2, shared=False)
    assert {path: oct(mode) for path, mode in found.items() if mode & 0o077} == {}
    assert all(mode & 0o600 == 0o600 for mode in found.values())


@pytest.mark.slow
def test_a_config_that_shares_its_files_leaves_the_modes_to_the_umask(tmp_path: Path) -> None:
    found = run_all(tmp_path, 1, shared=True)
    usual = {0o777 & ~UMASK, 0o666 & ~UMASK}
    assert {path: oct(mode) for path, mode in found.items() if mode not in usual} == {}


@pytest.mark.slow
def test_a_run_that_others_could_read_goes_on_and_only_its_new_files_are_private(tmp_path: Path) -> None:
    config, run_dir = write_task(tmp_path, objective={"name": "sft"}), tmp_path / "run"
    train(config, "run.steps=1", "run.shared_files=true")
    before = modes_below(run_dir)
    assert "resuming from" in train(config, "run.steps=2")
    after = modes_below(run_dir)
    modes = [
        {
            after[path]
            for path in after
            if path == f"run/checkpoints/{step}" or path.startswith(f"run/checkpoints/{step}/")
        }
        for step in ("step_000001", "step_000002")
    ]
    assert modes == [{0o755, 0o644}, {0o700, 0o600}]
    assert after["run"] == before["run"] == 0o755
    assert {path for path, mode in after.items() if mode & 0o077} <= before.keys()
