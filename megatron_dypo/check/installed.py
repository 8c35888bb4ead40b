"""The packages of this environment as ``megatron-dypo doctor`` finds them, also where torch is not installed."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dypo.metrics.versions import installed_versions

PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "sglang-router", "transformers")
"""Packages that pip knows by these names, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The versions and the GPUs of an environment."""

    python: str
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package → version, for those of :data:`PACKAGES` that are installed."""
    apex: str | None = None
    """``NVIDIA`` or ``PyPI``, a different project of that name; None: neither."""
    torch_error: str | None = None
    """Reason for which torch cannot be imported; None if it can, or is not installed."""
    toolkit: str | None = None
    """Version of the CUDA toolkit that torch was built with; None: built without, or torch is missing."""
    gpus: tuple[str, ...] = ()
    """Name and compute capability of each GPU that torch sees."""


def look() -> Installed:
    """Look at the environment of this interpreter. Of the packages only torch is imported, if it is installed."""
    versions = installed_versions(PACKAGES)
    error, toolkit, gpus = _ask_torch() if "torch" in versions else (None, None, ())
    return Installed(
        python=platform.python_version(),
        versions=versions,
        apex=_find_apex(),
        torch_error=error,
        toolkit=toolkit,
        gpus=gpus,
    )


def _ask_torch() -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the reason for which torch cannot be imported, its toolkit, and the GPUs that it sees."""
    try:
        from megatron_dypo.parallel import device
    except (ImportError, OSError, RuntimeError) as error:  # such as a library of the GPU's maker that is missing
        return str(error).splitlines()[0][:200] if str(error) else type(error).__name__, None, ()
    return None, ".".join(map(str, device.toolkit_version())) or None, device.gpus()


def _find_apex() -> str | None:
    """Tell NVIDIA's Apex from PyPI's package of that name, without importing either."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    return "NVIDIA" if any((folder / "multi_tensor_apply").is_dir() for folder in folders) else "PyPI"
