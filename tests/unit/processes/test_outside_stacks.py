"""The stacks of a stalled rank by py-spy: they reach the first rank's log, and a py-spy that fails does no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dypo.metrics.logs import log_path
from megatron_dypo.processes import stalls
from megatron_dypo.processes.heartbeats import FOLDER, Heartbeat
from megatron_dypo.processes.identity import own_identity

Warn = Callable[[str | None], str]


@pytest.fixture
def log_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Warn:
    """Give ``log_with(script)``: the log after a warning of a silent rank. ``script`` is py-spy, if given."""
    programs = tmp_path / "bin"
    for folder in (programs, tmp_path / FOLDER, tmp_path / "logs"):
        folder.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    beat = Heartbeat(
        attempt="this",
        rank=2,
        host="node2",
        process=own_identity(),
        beats=1,
        part="updating",
        where="step (a.py:1)",
        stack="step (a.py:1) < train (b.py:2)",
        is_in_collective=True,
        idle_s=0.0,
        part_s=0.0,
    )

    def warn(script: str | None) -> str:
        if script is not None:
            (programs / "py-spy").write_text(f"#!/bin/sh\n{script}\n")
            (programs / "py-spy").chmod(0o755)
        assert stalls.warn_of_silence(tmp_path, beat, 40.0, usual_s=6.0, ends_s=1800.0)
        log = log_path(tmp_path, 0).read_text()
        assert "stall: rank 2 on node2 (process " in log.splitlines()[0]
        return log

    return warn


def test_the_stacks_according_to_py_spy_are_in_the_log(log_with: Warn) -> None:
    log = log_with('echo "Thread 1: told $*"')
    _, head, stacks = log.splitlines()
    assert head.endswith("according to py-spy:")
    assert "the stacks of rank 2 on node2" in head
    assert stacks == f"Thread 1: told dump --nonblocking --pid {own_identity().pid}"


def test_without_py_spy_there_is_only_the_warning(log_with: Warn) -> None:
    assert len(log_with(None).splitlines()) == 1


def test_a_py_spy_that_fails_is_one_line(log_with: Warn) -> None:
    log = log_with("echo 'Error: Permission Denied' >&2; exit 1")
    assert log.splitlines()[2:] == ["py-spy failed: Error: Permission Denied"]


def test_a_py_spy_that_cannot_be_started_is_one_line(log_with: Warn, tmp_path: Path) -> None:
    (tmp_path / "bin" / "py-spy").write_text("no program")
    (tmp_path / "bin" / "py-spy").chmod(0o755)
    (line,) = log_with(None).splitlines()[2:]
    assert line.startswith("py-spy failed: [Errno 8] Exec format error")


def test_a_py_spy_that_hangs_is_ended_and_is_one_line(log_with: Warn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "_PY_SPY_S", 0.2)
    (line,) = log_with("while :; do :; done").splitlines()[2:]
    assert line.startswith("py-spy failed: ")
    assert line.endswith("timed out after 0.2 seconds")
