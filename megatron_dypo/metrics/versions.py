"""``versions.json`` in a run's folder: the versions of the packages that the run used."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import megatron_dypo
from megatron_dypo.fs import replace_file

VERSIONS_FILE = "versions.json"
_DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "math-verify", "numpy")


def collect_versions() -> dict[str, str]:
    """Return distribution → version for the installed distributions, without importing them."""
    own = {"megatron-dypo": megatron_dypo.__version__, "python": platform.python_version()}
    return own | installed_versions(_DISTRIBUTIONS)


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return distribution → version for those of ``names`` that are installed, without importing them."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_versions(run_dir: Path) -> None:
    """Write ``versions.json`` into the run folder."""
    replace_file(run_dir / VERSIONS_FILE, json.dumps(collect_versions(), indent=2) + "\n")
