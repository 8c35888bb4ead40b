"""Write the hashes of the pinned packages into requirements/: python tools/pin_hashes.py [FILE …]

``make setup`` and its siblings install with ``--require-hashes``, so a package that was replaced on an index is
refused. The hashes are those that PyPI lists for every file of a pinned version that CPython on Linux x86-64 can use:
CPython 3.11, or the versions that a comment of the file names, as in ``# For CPython 3.12, 3.13.``. torch has none: its
build depends on the index that it comes from.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
INDEX = "https://pypi.org/simple"
WITHOUT = ("torch",)
_PIN = re.compile(r"([\w.-]+)==([^\s;\\]+)")
_PYTHONS = re.compile(r"# For CPython (3\.\d+(?:, 3\.\d+)*)\.")
_HASH = "    --hash=sha256:"


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="Files of pins; all of requirements/ if none.")] = None,
) -> None:
    """Write the hashes of the pinned packages into requirements/."""
    for file in files or sorted(REQUIREMENTS.glob("*.txt")):
        file.write_text("".join(f"{line}\n" for line in with_hashes(file.read_text().splitlines())))
        typer.echo(f"{file}: written")


def with_hashes(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a file of pins, each pin followed by the hashes of its files."""
    pythons = pythons_of(lines)
    for line in lines:
        if line.startswith(_HASH):
            continue
        pin = _PIN.match(line)
        if pin is None or pin[1] in WITHOUT:
            yield line
            continue
        hashes = sorted(hashes_of(pin[1], pin[2], pythons))
        if not hashes:
            raise typer.BadParameter(f"{pin[0]}: {INDEX} lists no file that CPython on Linux x86-64 can use")
        yield f"{pin[0]} \\"
        yield from (f"{_HASH}{one} \\" for one in hashes[:-1])
        yield f"{_HASH}{hashes[-1]}"


def pythons_of(lines: Sequence[str]) -> tuple[int, ...]:
    """Return the minor versions of CPython that a file of pins is for."""
    named = [found[1] for line in lines if (found := _PYTHONS.match(line))]
    return tuple(int(version.removeprefix("3.")) for version in named[0].split(", ")) if named else (11,)


def hashes_of(name: str, version: str, pythons: Sequence[int]) -> set[str]:
    """Return the SHA-256 of each usable file of a version: its wheels, and its source archive if it has no wheel."""
    request = urllib.request.Request(
        f"{INDEX}/{re.sub(r'[-_.]+', '-', name).lower()}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        listed = json.load(answer)["files"]
    wheels = {one["hashes"]["sha256"] for one in listed if is_usable(one["filename"], version, pythons)}
    archives = {
        one["hashes"]["sha256"]
        for one in listed
        if re.fullmatch(rf".*-{re.escape(version)}\.(tar\.gz|zip)", one["filename"])
    }
    return wheels or archives


def is_usable(filename: str, version: str, pythons: Sequence[int]) -> bool:
    """Return whether a file is a wheel of this version for CPython 3.x on Linux x86-64, for an x of ``pythons``."""
    try:
        _, found, _, tags = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return False
    return str(found) == version and any(
        (tag.platform == "any" or ("linux" in tag.platform and tag.platform.endswith("x86_64")))
        and (
            tag.interpreter in ("py3", f"cp3{python}", f"py3{python}")
            or (tag.abi == "abi3" and _is_older(tag.interpreter, python))
        )
        for tag in tags
        for python in pythons
    )


def _is_older(interpreter: str, python: int) -> bool:
    found = re.fullmatch(r"cp3(\d+)", interpreter)
    return found is not None and int(found[1]) <= python


if __name__ == "__main__":
    typer.run(main)
