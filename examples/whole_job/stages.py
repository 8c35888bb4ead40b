"""Run the stages of a job that goes on after an interruption, and the commands of the stages."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dypo.fs import replace_file
from whole_job.guarded import ROOT as ROOT
from whole_job.guarded import run_to_the_end


class Stages:
    """The stages of a job: which are complete, and how long each took. A file keeps this for the next call."""

    def __init__(self, path: Path, seed: int) -> None:
        """Read the file. Raises ValueError if the folder holds a job of another seed."""
        self._path = path
        self._state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "stages": {}}
        if self._state["seed"] != seed:
            raise ValueError(
                f"--seed {seed}: {path} is of seed {self._state['seed']}; choose another --out or remove it"
            )

    @property
    def seconds(self) -> float:
        """Return the time of all stages, including those of earlier calls and those that were interrupted."""
        return sum(float(stage["seconds"]) for stage in self._state["stages"].values())

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Run a stage unless it is complete."""
        stage = self._state["stages"].setdefault(name, {"seconds": 0.0, "complete": False})
        if stage["complete"]:
            print(f"\n== {name}: done before ({stage['seconds']:.0f} s)", flush=True)
            return
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        try:
            action()
            stage["complete"] = True
        finally:
            stage["seconds"] = float(stage["seconds"]) + time.monotonic() - start
            write_json(self._path, self._state)


def command(*arguments: str) -> None:
    """Print and run ``megatron-dypo …``; end this program if it fails."""
    _run("megatron-dypo", arguments, [sys.executable, "-m", "megatron_dypo.cli"])


def script(*arguments: str) -> None:
    """Print and run ``python …``; end this program if it fails."""
    _run("python", arguments, [sys.executable])


def _run(name: str, arguments: tuple[str, ...], program: list[str]) -> None:
    print(f"$ {name} {shlex.join(arguments)}", flush=True)
    status = run_to_the_end([*program, *arguments])
    if status:
        sys.exit(f"{name} {arguments[0]} ended with status {status}; run the same command again to go on")


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=2) + "\n")
