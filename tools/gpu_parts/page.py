"""The one JSON file and the one page of a check."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dypo.fs import replace_file
from tools.gpu_parts.stages import Stage, summary


def write_result(
    out: Path,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    stages: Sequence[Stage],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ``result.json`` and ``page.md`` about the stages that have run."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"date": date, "machine": dict(machine), "versions": dict(versions), "stages": dict(results)}
    replace_file(out / "result.json", json.dumps(content, indent=1) + "\n")
    replace_file(out / "page.md", page(date, machine, versions, stages, results))


def page(
    date: str,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    stages: Sequence[Stage],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the page: the machine, a line for each stage, and each bar."""
    count = f"{machine['num_gpus']} × " if machine["num_gpus"] > 1 else ""
    lines = [
        f"# Check of {count}{machine['device']}, {date}",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {machine['features']}.",
        "",
        "| stage | what | result |",
        "|---|---|---|",
    ]
    run = [(stage, results[stage.name]) for stage in stages if stage.name in results]
    lines += [f"| {stage.name} | {stage.about} | {summary(result)} |" for stage, result in run]
    for stage, result in run:
        lines += ["", f"## {stage.name}", ""]
        verdicts = result.get("verdicts", {})
        lines += [f"- {'met' if is_met else '**missed**'}: {bar}" for bar, is_met in verdicts.items()]
        if "error" in result:
            lines.append(f"- **failed**: {result['error']}")
        numbers = {name: value for name, value in result.items() if name not in ("verdicts", "error")}
        lines += ["", "```json", json.dumps(_short(numbers), indent=1), "```"]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> Any:
    """Return a value with long lists cut to their ends."""
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, list) and len(value) > 6:
        return [*value[:3], "…", *value[-2:]]
    return value
