"""A part of the tests is chosen by its mark: ``pytest -m dist``."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_each_test_has_the_mark_of_its_folder_and_of_no_other(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        marks = {mark.name for mark in item.iter_markers()} & {"e2e", "dist", "unit"}
        assert marks == {item.path.relative_to(TESTS).parts[0]} - {"gpu"}, item.nodeid


def test_folders_with_long_files_come_first(request: pytest.FixtureRequest) -> None:
    folders = [item.path.relative_to(TESTS).parts[0] for item in request.session.items]
    assert folders == sorted(folders, key=["e2e", "dist", "unit", "gpu"].index)
