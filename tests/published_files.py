"""Files of published models, which the packages of ``requirements/test_data.txt`` carry."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "test_data"
"""Where ``make setup`` puts the packages; on no import path."""


def published_file(package: str, name: str) -> Path:
    """Return the path of a file of a package.

    Without the package the test is skipped, or fails where ``DYPO_REQUIRE_TEST_DATA`` is set.
    """
    for found in importlib.metadata.distributions(name=package, path=[str(FOLDER)]):
        path = Path(str(found.locate_file(name)))
        if not path.is_file():
            raise FileNotFoundError(f"{package} {found.version} has no {name}: tests are written for another version")
        return path
    message = f"needs the package {package} in {FOLDER}: make setup puts it there"
    if os.environ.get("DYPO_REQUIRE_TEST_DATA"):
        pytest.fail(message)
    pytest.skip(message, allow_module_level=True)
