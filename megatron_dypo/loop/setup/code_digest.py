"""Digests of Python code: of this program, and of a module of the user's. Nothing is imported for them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import megatron_dypo

OWN_PACKAGE = "megatron_dypo"
_IMPORTS = re.compile(rb"^[ \t]*(?:from[ \t]+(\w+)[\w.]*[ \t]+import|import[ \t]+([^#\r\n]+))", re.MULTILINE)


def digest_of_program(part: str = "") -> str:
    """Return a digest of the names and contents of all Python files of this package, or of one folder in it."""
    return _digest(_python_files(Path(megatron_dypo.__path__[0], part)))


def digest_of_module(module: str) -> str | None:
    """Return a digest of the code behind a module, wherever it lies; None if the module has no Python file.

    The code is all Python files of the module's top-level package, or the file of a module without a package. Where
    modules beside it, in the same folder, are imported by name, they belong to it too, and so on. Installed packages
    that the code imports do not, nor does this package.
    """
    top, *rest = module.split(".")
    spec = _spec_of(top)
    places = [] if spec is None else _places_of(spec)
    if not any(file.is_file() for place in places for file in _files_that_may_hold(place, rest)):
        return None
    files: dict[str, Path] = {}
    for place in places:
        files |= _with_neighbours(place)
    return _digest(files)


def _spec_of(top: str) -> ModuleSpec | None:
    importlib.invalidate_caches()
    try:
        return importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return None


def _places_of(spec: ModuleSpec) -> list[Path]:
    """Return the folders of a package, which may be several, or the file of a module."""
    if spec.submodule_search_locations is not None:
        return [Path(folder).absolute() for folder in spec.submodule_search_locations]
    return [Path(spec.origin).absolute()] if spec.origin and spec.origin.endswith(".py") else []


def _files_that_may_hold(place: Path, rest: list[str]) -> list[Path]:
    """Return the possible files of a module: a file; or in a package, its own or that of a submodule."""
    if place.suffix == ".py":
        return [] if rest else [place]
    inside = place.joinpath(*rest)
    # A top-level package without __init__.py is no module that has functions.
    return [inside / "__init__.py", *([inside.with_suffix(".py")] if rest else [])]


def _with_neighbours(place: Path) -> dict[str, Path]:
    """Return name → file for a package or module, and for those beside it that it imports, directly or not."""
    found: dict[str, Path] = {}
    waiting, seen = [place], {place.stem, OWN_PACKAGE}
    while waiting:
        files = _python_files(waiting.pop())
        found |= files
        if _is_of_all(place.parent):
            continue
        for name in _imported(files.values()) - seen:
            seen.add(name)
            waiting += [one for one in (place.parent / name, place.parent / f"{name}.py") if one.exists()]
    return found


def _is_of_all(folder: Path) -> bool:
    """Return whether a folder holds installed packages or Python's own modules, which are no code of one author."""
    return folder.name in ("site-packages", "dist-packages") or folder == Path(os.__file__).absolute().parent


def _imported(files: Iterable[Path]) -> set[str]:
    """Return the top-level names of all import statements, and some that only look like one."""
    names: set[str] = set()
    for file in files:
        for package, listed in _IMPORTS.findall(file.read_bytes()):
            words = [package] if package else [one.split()[0] for one in listed.split(b",") if one.strip()]
            names |= {word.decode(errors="replace").partition(".")[0] for word in words}
    return {name for name in names if name.isidentifier()}


def _python_files(place: Path) -> dict[str, Path]:
    """Return the name below the folder of ``place`` → file, for a file or all Python files in a folder."""
    files = [place] if place.suffix == ".py" else place.rglob("*.py")
    named = {file.relative_to(place.parent): file for file in files if file.is_file()}
    return {name.as_posix(): file for name, file in named.items() if not any(p.startswith(".") for p in name.parts)}


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
