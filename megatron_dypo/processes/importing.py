"""A user's code: import it by a name in the config, and tell in one line what it raised."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

_OWN_CODE = str(Path(__file__).resolve().parents[1])
"""The folder of this package: a line number in it tells a user nothing."""
_MAX_ERROR_CHARACTERS = 500


def import_name(path: str) -> Any:
    """Import ``package.module:name`` and return the object of that name. This runs the code of the module.

    The module may lie in the folder where the run was started, which a console script does not search.

    Raises:
        ValueError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything while it is imported
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        reason = printable(str(error)) if isinstance(error, ImportError) else describe(error)
        raise ValueError(f"cannot import {module_name}: {reason}{hint}") from error
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"module {module_name} has no {name!r}")
    return found


def describe(error: BaseException) -> str:
    """Return one line about an error that a user's code raised: ``KeyError: 'unit' (my_rewards.py:12)``."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001 (the message is foreign code too)
        text = f"its message cannot be shown, {type(second).__name__}"
    frames = traceback.extract_tb(error.__traceback__)
    is_own = not frames or frames[-1].filename.startswith(_OWN_CODE)
    place = "" if is_own else f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return printable(f"{type(error).__name__}: {text}"[: 4 * _MAX_ERROR_CHARACTERS], place)


def printable(text: str, place: str = "") -> str:
    """Return ``text`` in one line of at most 500 characters that any stream can print, with ``place`` at its end."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    limit = _MAX_ERROR_CHARACTERS - len(place)
    return (line if len(line) <= limit else f"{line[: limit - 1]}…") + place
