"""The stages of the GPU check. Each writes one JSON file when it is done; a later call goes on after them.

A stage that failed has an ``error`` in its file, or a bar that it missed, and is run again by the next call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.fs import replace_file
from tools.gpu_parts.jobs import JobError
from tools.gpu_parts.run_part import PartError

LIMIT_S = 600.0
"""Longest time of a stage on one GPU."""
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the check."""

    name: str
    about: str
    """What it shows, for the page."""
    run: Callable[[], Result]
    """Returns a result with ``verdicts`` (bar → whether it is met), or ``skipped`` with the reason."""


def run_stages(
    stages: Sequence[Stage], folder: Path, key: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Result]:
    """Run the stages that are not done yet; return name → result of all.

    Args:
        key: what the results depend on: machine, versions and sizes. A result under another key does not count.
    """
    results = {}
    for stage in stages:
        path = folder / f"{stage.name}.json"
        done = _read(path, key)
        if done is not None:
            say(f"{stage.name}: done before")
            results[stage.name] = done
            continue
        say(f"{stage.name}: {stage.about}")
        results[stage.name] = _run(stage)
        replace_file(path, json.dumps({"key": dict(key), **results[stage.name]}, indent=1) + "\n")
        say(f"{stage.name}: {summary(results[stage.name])}")
    return results


def is_good(result: Mapping[str, Any]) -> bool:
    """Return whether a stage met all of its bars, or had nothing to do here."""
    return "error" not in result and all(result.get("verdicts", {}).values())


def summary(result: Mapping[str, Any]) -> str:
    """Return one line about a result."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    if "error" in result:
        return f"failed: {result['error']}"
    verdicts = result["verdicts"]
    return f"{sum(verdicts.values())} of {len(verdicts)} bars met in {result['seconds']:.0f} s"


def _run(stage: Stage) -> Result:
    start = time.monotonic()
    try:
        result = stage.run()
    except (PartError, JobError, ValueError) as error:
        result = {"error": str(error), "verdicts": {}}
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _read(path: Path, key: Mapping[str, Any]) -> Result | None:
    """Return a result that counts, else None."""
    if not path.is_file():
        return None
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("key", None) != json.loads(json.dumps(key)) or not is_good(found):
        return None
    return found
