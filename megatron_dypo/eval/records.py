"""The records of an evaluation: one line of JSON for each response, written durably, and the setting they belong to.

``<out>/<set>.jsonl`` has the responses of a set. ``<out>/<set>.setting.json`` has the setting that determines them:
model, sampling, verifier, content of the set. A response with a record is never requested again. So records of another
setting are refused instead of being mixed with new ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dypo.eval.locked_lines import LockedLines, parse_line, whole_lines
from megatron_dypo.metrics.names import name_part

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One response to one item, with its verdict."""

    set: str
    item: str
    """``prompt_id`` of the row."""
    sample: int
    """Number of the response among the item's responses, from 0."""
    seed: int
    """Seed that the server was given for this response."""
    source: str
    correct: bool | None
    """None: there is no verdict, and ``error`` says why."""
    truncated: bool
    """Whether the response hit the length limit."""
    num_tokens: int
    response: str
    answer: str | None
    """The answer that the response states, for majorities. None: it states none, or the verifier does not tell."""
    error: str | None = None


def records_path(out: Path, name: str) -> Path:
    """Return the file with the records of the set ``name``."""
    return out / f"{name_part(name)}.jsonl"


def setting_path(out: Path, name: str) -> Path:
    """Return the file with the setting of the set ``name``."""
    return out / f"{name_part(name)}.setting.json"


def read_records(path: Path) -> list[Record]:
    """Return all records of a file; [] if there is no file. An incomplete last line is left out.

    Raises:
        ValueError: a line is no record, or a response has two; file, line and rule are named.
    """
    text, _ = whole_lines(path.read_bytes()) if path.exists() else (b"", 0)
    records: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        record = parse_line(line, f"{path}:{number}", Record)
        key = (record.item, record.sample)
        if key in records:
            raise ValueError(f"{path}:{number}: item={record.item!r}, sample={record.sample}: has a record already")
        records[key] = record
    return list(records.values())


class RecordFile:
    """The records of one set, which an evaluation reads and extends. It is a context manager that locks the file.

    Args:
        out: folder of the evaluation.
        name: of the set.
        setting: field → JSON value, for everything that determines the responses and their verdicts.

    Raises:
        ValueError: another process has the file open; or its records belong to another setting, in which case the
            message names the first field that differs.
    """

    def __init__(self, out: Path, name: str, setting: Mapping[str, Any]) -> None:
        self._path = records_path(out, name)
        self._lines = LockedLines(self._path, setting_path(out, name), setting)
        self.records: list[Record] = []
        """All records of the file, in the order in which they came."""

    def __enter__(self) -> RecordFile:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lines)
            self.records = read_records(self._path)
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the file and its lock. Idempotent."""
        self._lines.close()

    def append(self, records: Sequence[Record]) -> None:
        """Add records; they are on the disk when this returns."""
        self._lines.append([vars(record) for record in records])
        self.records.extend(records)
