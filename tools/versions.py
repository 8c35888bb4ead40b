"""Build an environment for each pair of Python and Megatron-Core, and run its tests: make test-versions

A pair is ``python/core``, such as ``3.12/0.19.2``. Each Python is looked up among the interpreters that are given,
then on the path as ``python3.12``; a pair whose Python is missing is skipped with that reason. Environments are kept in
``.venv-versions`` (5 GB each, most of it torch). On 3.11 and later a pair gets the packages that
``requirements/cpu.txt`` pins, SGLang among them, and ends with a run of ``megatron-dypo train`` on a real server. On
3.10, for which some of these have no release, pip chooses within the ranges of ``setup.cfg``, and that run is left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
PINS = ROOT / "requirements" / "cpu.txt"
TESTS = ("tests/unit/mcore", "tests/dist")
END_TO_END = ("tests/e2e/test_train_command.py", "-k", "weights_just_pushed or run_folder_holds")
"""A run at TP2×PP2 with two servers. Its log-probs must differ from SGLang's by at most 1e-3."""
_OWN = ("torch", "triton", "megatron-core")
"""Packages of which a pair has versions of its own; torch brings its triton."""
_MIN_PINNED = (3, 11)


@dataclass(frozen=True)
class Pair:
    """Versions that are tested together."""

    python: str
    core: str
    torch: str

    def __str__(self) -> str:
        return f"{self.python}/{self.core}"

    @property
    def is_pinned(self) -> bool:
        """Return whether the packages of ``requirements/cpu.txt`` have releases for this Python."""
        return tuple(map(int, self.python.split("."))) >= _MIN_PINNED


PAIRS = (
    Pair("3.10", "0.16.1", "2.8.0"),
    Pair("3.11", "0.16.1", "2.13.0"),
    Pair("3.12", "0.17.1", "2.14.1"),
    Pair("3.12", "0.18.2", "2.14.1"),
    Pair("3.12", "0.19.2", "2.14.1"),
    Pair("3.13", "0.19.2", "2.15.0"),
)
"""The first and the last release of everything appear, and every minor release of Megatron-Core."""


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Pairs such as 3.12/0.19.2; all if none.")] = None,
    python: Annotated[
        list[str] | None, typer.Option(help="An interpreter to use, by path or name; may be given several times.")
    ] = None,
    tests: Annotated[str, typer.Option(help="Tests to run in place of all of tests/unit/mcore and tests/dist.")] = "",
) -> None:
    """Build an environment for each pair of Python and Megatron-Core, and run its tests."""
    outcomes: dict[str, str] = {}
    for pair in chosen(only or []):
        interpreter = find_python(pair.python, python or [])
        if interpreter is None:
            outcomes[str(pair)] = f"skipped: no python{pair.python} on the path nor among --python"
            continue
        start = time.monotonic()
        outcomes[str(pair)] = f"{test(pair, interpreter, tests.split())} ({(time.monotonic() - start) / 60:.0f} min)"
        typer.echo(f"{pair}: {outcomes[str(pair)]}")
    for name, outcome in outcomes.items():
        typer.echo(f"python/core {name:12} {outcome}")
    if any("failed" in outcome for outcome in outcomes.values()):
        raise typer.Exit(1)


def chosen(names: Sequence[str]) -> list[Pair]:
    """Return the pairs of these names, all pairs if there are none.

    Raises:
        typer.BadParameter: no pair has that name.
    """
    known = {str(pair): pair for pair in PAIRS}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name}: must be one of {', '.join(known)}")
    return [known[name] for name in names or known]


def find_python(version: str, given: Sequence[str]) -> str | None:
    """Return the first interpreter of this version that runs: one of ``given``, or ``pythonX.Y`` on the path."""
    for name in (*given, f"python{version}"):
        path = shutil.which(name)
        if path is None:
            continue
        asked = subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return path
    return None


def test(pair: Pair, interpreter: str, tests: Sequence[str]) -> str:
    """Build the environment of a pair and run the tests in it; return the outcome in words."""
    environment = build(pair, interpreter)
    if environment is None:
        return "failed: its packages cannot be installed"
    runs = [[*(tests or TESTS), "-m", "not slow and not gpu"]] + ([[*END_TO_END]] if pair.is_pinned else [])
    failed = [
        arguments[0]
        for arguments in runs
        if subprocess.run([environment, "-m", "pytest", "-q", *arguments], cwd=ROOT).returncode
    ]
    return f"failed: {', '.join(failed)}" if failed else "passed" + ("" if pair.is_pinned else ", without a server")


def build(pair: Pair, interpreter: str) -> str | None:
    """Make the environment of a pair, or change that of its Python. Return its interpreter, None on failure."""
    folder = ENVIRONMENTS / f"py{pair.python.replace('.', '')}"
    own = str(folder / "bin" / "python")
    if not Path(own).exists():
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    core, torch = f"megatron-core=={pair.core}", f"torch=={pair.torch}"
    if pair.is_pinned:
        steps = [
            [torch],
            ["--no-deps", *pins(PINS.read_text(encoding="utf-8")), core],
            ["--no-deps", "--no-build-isolation", "-e", "."],
        ]
    else:
        steps = [[torch, core, "-e", ".[dev]"]]
    for step in steps:
        if subprocess.run([*pip, *step], cwd=ROOT).returncode:
            return None
    return own


def pins(text: str) -> list[str]:
    """Return the pins of a file of requirements without hashes, which are those of another Python's files."""
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", text, flags=re.MULTILINE)
    return [f"{name}=={version}" for name, version in found if name not in _OWN]


if __name__ == "__main__":
    typer.run(main)
