"""The records of ``metrics.jsonl``, and of other files with a JSON object on each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dypo.json_text import parse_json

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``: ``step``, ``time`` (seconds since the epoch), then the metrics (None
    if not finite).

    An unfinished last line of a killed run is ignored. ValueError (file, line) for any other bad line.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
    return records
