"""The versions that the package works with: how they compare, and that pip is told the same."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_dypo.supported import CPU_CORES, RANGES, Range, is_at_least, newest_core, numbers

ROOT = Path(__file__).parents[2]


def ranges_of_setup() -> dict[str, SpecifierSet]:
    """Return package → range, from the metadata of the package and its extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    found = {one.name: one.specifier for one in map(Requirement, lines)}
    return found | {"python": SpecifierSet(setup["options"]["python_requires"])}


@pytest.mark.parametrize("package", RANGES)
def test_pip_is_told_the_same_range(package: str) -> None:
    assert ranges_of_setup()[package] == SpecifierSet(str(RANGES[package]))


def test_every_core_with_cpu_patches_is_in_the_range() -> None:
    assert all(core in RANGES["megatron-core"] for core in CPU_CORES)
    minors = [numbers(core)[1] for core in CPU_CORES]
    assert minors == [*range(16, 20)]


@pytest.mark.parametrize(
    ("version", "is_in"),
    [("0.15.9", False), ("0.16", True), ("0.16.0rc0", True), ("0.19.2", True), ("0.20", False), ("0.20.0", False)],
)
def test_a_range_has_its_lower_and_not_its_upper_end(version: str, is_in: bool) -> None:
    assert (version in Range(oldest="0.16", below="0.20")) == is_in


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        ("2.13.0+cpu", "2.13", True),
        ("2.8", "2.8.0", True),
        ("2.15.0a0+git7", "2.15", True),
        ("2.9", "2.10", False),
        ("0.5.12.post1", "0.5.12", True),
        ("0.5.9", "0.5.22", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, oldest: str, expected: bool) -> None:
    assert is_at_least(version, oldest) == expected


@pytest.mark.parametrize(
    ("python", "core"), [("3.10.13", "0.16.1"), ("3.11.7", "0.16.1"), ("3.12.1", "0.19.2"), ("3.13.0", "0.19.2")]
)
def test_the_newest_core_is_that_with_wheels_for_this_python(python: str, core: str) -> None:
    assert newest_core(python) == core
