"""The package Megatron-Bridge: imported here and nowhere else.

Its adapters for LoRA are built of Transformer Engine's classes, and importing any part of the package imports them.
They are not used here. Where Transformer Engine cannot be imported, empty modules stand in for them, so that the
package imports on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron_dypo.mcore.features import shield_imports, uses_transformer_engine

_log = logging.getLogger(__name__)
_PACKAGE = "megatron.bridge"
_ADAPTERS = ("megatron.bridge.peft.lora_layers", "megatron.bridge.peft.lora")
"""Modules with ``import transformer_engine`` at their top (0.3.1: peft/lora_layers.py:20, peft/lora.py:20)."""
TRIED = "0.3.1"
"""The release with which models are tested."""
NOT_INSTALLED = (
    "model.family=bridge: needs the package megatron-bridge, which is not installed (docs/hf_models.md says how to "
    "install it)"
)


class _Adapters(types.ModuleType):
    """A stand-in for a module of adapters: every public name in it is a class without instances."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (), {})


def is_installed() -> bool:
    """Return whether the package is there. It is not imported."""
    return importlib.util.find_spec(_PACKAGE) is not None


def import_bridge() -> Any:
    """Return the package ``megatron.bridge``.

    Raises:
        ValueError: it is not installed, or a package that it needs is missing; says what to install.
    """
    shield_imports()
    if not is_installed():
        raise ValueError(NOT_INSTALLED)
    try:
        with contextlib.nullcontext() if uses_transformer_engine() else _without_adapters():
            package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise ValueError(
            f"model.family=bridge: megatron-bridge cannot be imported ({error}): install what its own requirements name"
        ) from error
    note_version(importlib.metadata.version("megatron-bridge"))
    return package


@functools.cache
def note_version(version: str) -> None:
    """Warn once of a release that was not tried."""
    if version != TRIED:
        _log.warning("megatron-bridge %s: only %s was tried with model.family=bridge", version, TRIED)


@contextlib.contextmanager
def _without_adapters() -> Iterator[None]:
    """Let stand-ins be found for the modules of adapters while the block runs."""
    added = {name: _Adapters(name) for name in _ADAPTERS if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
