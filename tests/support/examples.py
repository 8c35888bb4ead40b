"""Load modules of an example's folder, although other examples have modules of the same names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(folder: str, *names: str) -> list[ModuleType]:
    """Import modules of an example as its scripts do; afterwards restore the meaning of their names."""
    path = EXAMPLES / folder
    own = {file.stem for file in path.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.path.insert(0, str(path))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(path))
        for name in own & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(others)
