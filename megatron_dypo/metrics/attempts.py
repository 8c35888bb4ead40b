"""``run.dir/attempts.jsonl``: when each start of a run began and ended, and which steps it had to make again.

Each line has ``time`` (seconds since the epoch) and ``event``:

* ``start`` (``attempt``): the first rank holds the run's lock;
* ``redo`` (``steps``, ``seconds``, ``first_time``, ``last_time``): a resume removed the records of steps after its
  checkpoint, which are made again;
* ``end`` (``attempt``, ``cause``): the first report of the end. A start that was killed has none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dypo.metrics.records import read_metrics

NAME = "attempts.jsonl"


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """Append a line. Raises OSError if it cannot be written."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
    with (run_dir / NAME).open("a", encoding="utf-8") as file:
        file.write(line)


def note_redone(run_dir: Path, removed: Sequence[Mapping[str, Any]]) -> None:
    """Append the event ``redo`` for records of steps that are made again; nothing if there are none."""
    if removed:
        seconds = [step_seconds(record) for record in removed]
        note(
            run_dir,
            "redo",
            steps=len(removed),
            seconds=sum(seconds),
            first_time=removed[0]["time"] - seconds[0],
            last_time=removed[-1]["time"],
        )


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines, in the order in which they were written; [] without a file.

    Raises:
        ValueError: a line is no JSON object (file, line). The unfinished last line of a killed run is ignored.
    """
    path = run_dir / NAME
    return read_metrics(path) if path.is_file() else []


def step_seconds(record: Mapping[str, Any]) -> float:
    """Return the time of the step of a record; 0 for a record without one, such as an evaluation before training."""
    return float(record.get("timing_s/step") or 0.0)
