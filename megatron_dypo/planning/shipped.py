"""Sizes of published models, for plans without a model folder: one ``models/<name>/config.json`` each."""

from __future__ import annotations

import difflib
from pathlib import Path

from megatron_dypo.checks import require
from megatron_dypo.models.architecture import Architecture, load_architecture

_FOLDER = Path(__file__).parent / "models"


def shipped_models() -> list[str]:
    """Return the names that :func:`shipped_architecture` knows."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))


def shipped_architecture(name: str) -> Architecture:
    """Return the architecture of a published model.

    Raises:
        ValueError: there is none of that name; names the nearest known one, and all of them.
    """
    known = shipped_models()
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    require(name in known, f"model={name!r}", f"must be one of {', '.join(known)}{hint}")
    return load_architecture(_FOLDER / name)
