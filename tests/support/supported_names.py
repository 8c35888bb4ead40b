"""Names of other packages that this package uses, and whether a version of them has these names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.package_uses import Use, package_uses
from tests.support.private_names import all_private_names
from tests.support.sources import Found

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_dypo"
OLDEST_TORCH = ROOT / "tests" / "golden" / "torch_oldest_names.json"
"""Names of the oldest supported torch. ``tests/golden/render_torch_names.py`` says how to write it."""
TORCH = ("torch.cuda", "torch.accelerator", "torch.distributed", "torch.version")
"""Modules of torch whose names depend on the version or on CUDA."""

Find = Callable[[str], Found | None]


def uses_of(*prefixes: str) -> Iterator[tuple[str, Use]]:
    """Yield file and use of each name in this package that begins with one of ``prefixes``."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for use in package_uses(path.read_text(encoding="utf-8"), prefixes):
            yield str(path.relative_to(ROOT)), use


def private_uses_of(package: str) -> Iterator[tuple[str, Use]]:
    """Yield name and use of each PrivateName in ``package``. The arguments are those that its ``takes`` names."""
    for name, private in all_private_names().items():
        if private.package == package:
            yield name, Use(line=0, name=f"{private.module}.{private.name}", keywords=private.takes)


def problems(uses: Iterator[tuple[str, Use]], find: Find) -> list[str]:
    """Return a line for each use of a name, or of an argument, that is not there."""
    lines = []
    for where, use in uses:
        found = find(use.name)
        if found is None:
            lines.append(f"{where}:{use.line}: {use.name} does not exist")
        elif lacking := found.lacks(use.positional, use.keywords):
            lines.append(f"{where}:{use.line}: {use.name} takes no {', '.join(lacking)}")
    return lines


def oldest_torch() -> tuple[str, Find]:
    """Return the oldest supported version of torch, and a look-up of its names."""
    listed = json.loads(OLDEST_TORCH.read_text(encoding="utf-8"))

    def find(name: str) -> Found | None:
        if name not in listed["names"]:
            return None
        takes = listed["names"][name]
        return Found() if takes is None else Found(takes=tuple(takes), takes_more="*" in takes)

    return listed["version"], find
