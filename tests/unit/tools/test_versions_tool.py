"""The pairs of `make test-versions`: all that is supported is among them, and a missing Python is skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

from megatron_dypo.supported import CPU_CORES, RANGES, newest_core
from tests.support.pins import pins_of
from tools.versions import PAIRS, PINS, chosen, find_python, pins

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def interpreter(folder: Path, name: str, answer: str) -> str:
    """Make a program that answers ``answer`` to every question."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def test_every_core_and_both_ends_of_the_pythons_are_tested() -> None:
    assert {pair.core for pair in PAIRS} == set(CPU_CORES)
    assert [PAIRS[0].python, PAIRS[-1].python] == ["3.10", "3.13"]
    for pair in PAIRS:
        for package, version in (("python", pair.python), ("megatron-core", pair.core), ("torch", pair.torch)):
            assert version in RANGES[package]
    assert {pair.python: pair.core for pair in PAIRS} == {pair.python: newest_core(pair.python) for pair in PAIRS}


def test_the_oldest_and_a_torch_with_the_other_backend_are_tested() -> None:
    torches = [pair.torch for pair in PAIRS]
    assert RANGES["torch"].oldest + ".0" in torches
    assert "2.15.0" in torches


def test_a_pair_is_chosen_by_its_name() -> None:
    assert [pair.core for pair in chosen(["3.12/0.18.2"])] == ["0.18.2"]
    assert chosen([]) == [*PAIRS]
    with pytest.raises(typer.BadParameter, match=r"^3\.9/0\.16\.1: must be one of 3\.10/0\.16\.1, "):
        chosen(["3.9/0.16.1"])


def test_an_interpreter_counts_only_if_it_runs_and_has_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    old, broken = interpreter(tmp_path, "old", "echo 3.8"), interpreter(tmp_path, "broken", "exit 1")
    assert find_python("3.12", [old, broken, str(tmp_path / "missing")]) is None
    assert find_python(HERE, [old, broken, sys.executable]) == sys.executable
    on_path = interpreter(tmp_path, "python3.12", "echo 3.12")
    assert find_python("3.12", [old]) == on_path


def test_a_pair_has_the_packages_of_the_pinned_environment_but_its_own_core_and_torch() -> None:
    found = pins(PINS.read_text(encoding="utf-8"))
    left_out = set(pins_of(PINS)) - set(found)
    assert {pin.partition("==")[0] for pin in left_out} == {"triton", "megatron-core"}
