"""``megatron-dypo checkpoints`` lists the checkpoints of a run, with their damage and the rules that keep them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.fs import remove
from megatron_dypo.mcore.checkpoints.folder import folder_of, make_partial, publish, set_aside
from megatron_dypo.mcore.checkpoints.manifest import list_files, record_files, write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run whose checkpoints hold bytes."""
    for step in (10, 20, 30, 40):
        final = folder_of(tmp_path / "checkpoints", step)
        partial = make_partial(final, ("mcore",))
        (partial / "mcore" / "__0_0.distcp").write_bytes(bytes(range(256)) * 4096)
        (partial / "mcore" / "common.pt").write_bytes(b"common")
        (partial / "trainer_state.json").write_text('{"has_manifest": true}')
        write_manifest(partial, record_files(partial, list_files(partial)))
        publish(final)
    (tmp_path / "config.yaml").write_text(
        "model: {hf_path: m}\ndata: {prompts: [p]}\ncheckpoint: {keep: 1, keep_every: 20}\n"
    )
    return tmp_path


def listed(run: Path, *options: str) -> tuple[int, list[list[str]]]:
    """Return the exit status and the cells of the table, without its header."""
    done = CliRunner().invoke(app, ["checkpoints", str(run), *options])
    header, *lines = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines() if line.strip()]
    assert header == ["step", "size", "age", "kept by", "state"]
    return done.exit_code, lines


def test_step_size_rules_and_state_are_listed(run: Path) -> None:
    status, rows = listed(run, "--verify")
    assert status == 0
    assert [(row[0], row[1], row[3], row[4]) for row in rows] == [
        ("10", "1.0 MiB", "-", "whole"),
        ("20", "1.0 MiB", "every", "whole"),
        ("30", "1.0 MiB", "-", "whole"),
        ("40", "1.0 MiB", "last, every", "whole"),
    ]


def test_damage_is_named_and_is_the_exit_status(run: Path) -> None:
    root = run / "checkpoints"
    data = root / "step_000040" / "mcore" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    (root / "step_000030" / "mcore" / "common.pt").unlink()
    set_aside(root / "step_000020")
    status, rows = listed(run)
    assert status == 65
    assert [row[4] for row in rows] == [
        "whole",
        "set aside as DAMAGED; --verify names the file",
        "DAMAGED: mcore/common.pt: is missing",
        "whole",
    ]
    status, rows = listed(run, "--verify")
    assert status == 65
    assert rows[3][4].startswith("DAMAGED: mcore/__0_0.distcp: bytes 0 to 1048575 are not those that were written")


def test_a_checkpoint_without_a_manifest_is_said_to_be_unverified(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_000010"
    (checkpoint / "manifest.json").unlink()
    assert listed(run)[1][0][4] == "DAMAGED: manifest.json: is missing"
    (checkpoint / "trainer_state.json").write_text("{}")
    assert listed(run)[1][0][4] == "not verified: has no manifest.json"


def test_a_run_without_checkpoints_and_a_folder_that_is_no_run(run: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoints").glob("step_*"):
        remove(path)
    assert CliRunner().invoke(app, ["checkpoints", str(run)]).stdout.strip() == "no checkpoints"
    failed = CliRunner().invoke(app, ["checkpoints", str(run / "checkpoints")])
    assert isinstance(failed.exception, ValueError)
    assert "a run folder of `megatron-dypo train` is needed" in str(failed.exception)
