"""Run a function in a process that has Transformer Engine's Python, of the lowest or the highest supported version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / ".venv-te"
"""Folder where ``make setup-te`` puts both versions. It is on no import path."""
VERSIONS = ("lowest", "highest")


def te_folder(version: str) -> Path:
    """Return the folder with a version of the package.

    Without it the test is skipped; if ``DYPO_REQUIRE_TE`` is set, it fails.
    """
    folder = FOLDER / version
    if not (folder / "transformer_engine").is_dir():
        message = f"needs Transformer Engine's Python in {folder}: make setup-te puts it there (2 MB)"
        if os.environ.get("DYPO_REQUIRE_TE"):
            pytest.fail(message)
        pytest.skip(message, allow_module_level=True)
    return folder


def run_with_te(version: str, function: Callable[..., Any], *args: Any, deadline_s: float = 480.0) -> Any:
    """Call a module's function with JSON values in a process of its own, and return its result, a JSON value.

    The process sees a CPU, of which ``torch.cuda`` says that it is an H100. Models are built of Transformer Engine's
    layers; they have names, parameters and states, and no forward pass.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-m", "tests.support.te.program", str(te_folder(version)), name, json.dumps(args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
