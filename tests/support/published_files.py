"""Find files of published models, in the packages of ``requirements/test_data.txt`` and in llama.cpp."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

FOLDER = Path(sys.prefix) / "test_data"
"""Folder where ``make setup-test-data`` puts the packages. It is on no import path."""
_LLAMA_CPP = Path(__file__).parents[2] / ".venv-llama-cpp"


def published_file(package: str, name: str) -> Path:
    """Return the path of a file of a package.

    Without the package the test is skipped; if ``DYPO_REQUIRE_TEST_DATA`` is set, it fails.
    """
    found = _find(package)
    path = Path(str(found.locate_file(name)))
    if not path.is_file():
        raise FileNotFoundError(f"{package} {found.version} has no {name}: tests are written for another version")
    return path


def llama_cpp_file(name: str) -> Path:
    """Return the path of a file that ``make setup-llama-cpp`` fetches.

    Without the file the test is skipped; if ``DYPO_REQUIRE_LLAMA_CPP`` is set, it fails.
    """
    path = _LLAMA_CPP / name
    if not path.is_file():
        _miss(f"needs {name} of make setup-llama-cpp, which downloads 77 MB", "DYPO_REQUIRE_LLAMA_CPP")
    return path


def version_of(package: str) -> str:
    """Return the version of a package; skip or fail without it, like :func:`published_file`."""
    return _find(package).version


def _find(package: str) -> importlib.metadata.Distribution:
    found = next(iter(importlib.metadata.distributions(name=package, path=[str(FOLDER)])), None)
    if found is None:
        _miss(f"needs the package {package} in {FOLDER}: make setup-test-data puts it there", "DYPO_REQUIRE_TEST_DATA")
    return found


def _miss(message: str, required_by: str) -> NoReturn:
    if os.environ.get(required_by):
        pytest.fail(message)
    pytest.skip(message, allow_module_level=True)
