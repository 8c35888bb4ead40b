"""Who may read new files: the umask of a process, and the key of the run that a command reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.config.reading.access import set_access_of_checkpoint, shares_files
from megatron_dypo.fs import set_access
from tests.support.run_folder import make_run

SHARED, PRIVATE = "run: {shared_files: true}\n", "run: {shared_files: false}\n"


def umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


@pytest.mark.parametrize("before", [0o000, 0o002, 0o022, 0o027, 0o077, 0o177])
def test_access_is_only_ever_taken_away(before: int) -> None:
    os.umask(before)
    set_access(shared=True)
    assert umask() == before
    set_access(shared=False)
    assert umask() == before | 0o077


@pytest.mark.parametrize(
    "text", ["run: {steps: 3}\n", "run: {shared_files: 1}\n", PRIVATE, "", "[1]\n", "run: [a]\n", "run: {\n"]
)
def test_files_of_a_run_are_private_unless_its_config_says_otherwise(tmp_path: Path, text: str) -> None:
    assert not shares_files(tmp_path), "it has no config"
    (tmp_path / "config.yaml").write_text(text)
    assert not shares_files(tmp_path)
    (tmp_path / "config.yaml").write_text(SHARED)
    assert shares_files(tmp_path)


@pytest.mark.parametrize(
    ("configs", "mode"),
    [([SHARED], 0o644), ([PRIVATE], 0o600), ([SHARED, SHARED], 0o644), ([SHARED, PRIVATE], 0o600)],
)
def test_a_report_is_as_private_as_the_most_private_of_its_runs(tmp_path: Path, configs: list[str], mode: int) -> None:
    runs = [make_run(tmp_path / str(number), num_steps=2) for number, _ in enumerate(configs)]
    for run_dir, text in zip(runs, configs, strict=True):
        (run_dir / "config.yaml").write_text(text)
    os.umask(0o022)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(page.stat().st_mode) == mode


def test_a_checkpoint_outside_of_a_run_leaves_the_umask_and_one_of_a_run_has_its_key(tmp_path: Path) -> None:
    os.umask(0o022)
    set_access_of_checkpoint(tmp_path / "converted")
    assert umask() == 0o022
    (tmp_path / "config.yaml").write_text(SHARED)
    set_access_of_checkpoint(tmp_path / "checkpoints" / "step_000001" / "reference")
    assert umask() == 0o022
    (tmp_path / "config.yaml").write_text(PRIVATE)
    set_access_of_checkpoint(tmp_path / "checkpoints" / "step_000001" / "reference")
    assert umask() == 0o077
