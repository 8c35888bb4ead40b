"""The records of an evaluation: one line of JSON for each response, written durably, and the setting they belong to.

``<out>/<set>.jsonl`` has the responses of a set. ``<out>/<set>.setting.json`` has the setting that determines them:
model, sampling, verifier, content of the set. A response with a record is never requested again. So records of another
setting are refused instead of being mixed with new ones.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dypo.config.words import counted
from megatron_dypo.fs import replace_file, sync
from megatron_dypo.metrics.names import name_part

SUMMARY_FILE = "summary.json"

_log = logging.getLogger("megatron_dypo")


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


_KINDS: dict[str, tuple[type, ...]] = {
    "set": (str,),
    "item": (str,),
    "sample": (int,),
    "seed": (int,),
    "source": (str,),
    "correct": (bool, type(None)),
    "truncated": (bool,),
    "num_tokens": (int,),
    "response": (str,),
    "answer": (str, type(None)),
    "error": (str, type(None)),
}


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
    text, _ = _whole_lines(path.read_bytes()) if path.exists() else (b"", 0)
    records: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        record = _parse(line, f"{path}:{number}")
        key = (record.item, record.sample)
        if key in records:
            raise ValueError(f"{path}:{number}: item={record.item!r}, sample={record.sample}: has a record already")
        records[key] = record
    return list(records.values())


def _whole_lines(content: bytes) -> tuple[bytes, int]:
    """Return the lines that end, and the bytes of a last line that does not."""
    end = content.rfind(b"\n") + 1
    return content[:end], len(content) - end


def _parse(line: bytes, place: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(value, dict) or value.keys() != _KINDS.keys():
        raise ValueError(f"{place}: must be an object with {', '.join(_KINDS)}")
    for name, kinds in _KINDS.items():
        if type(value[name]) not in kinds:
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{place}: {name}={value[name]!r}: must be {words}")
    return Record(**value)


class RecordFile:
    """The records of one set, which an evaluation reads and extends. It is a context manager that locks the file.

    Args:
        out: folder of the evaluation.
        name: of the set.
        setting: field → JSON value, for everything that determines the responses and their verdicts.

    Raises:
        ValueError: another process has the file open; or its records belong to another setting, in which case the
        message
            names the first field that differs.
    """

    def __init__(self, out: Path, name: str, setting: Mapping[str, Any]) -> None:
        self._out, self._name, self._setting = out, name, dict(setting)
        self._path = records_path(out, name)
        self._descriptor = -1
        self.records: list[Record] = []
        """All records of the file, in the order in which they came."""

    def __enter__(self) -> RecordFile:
        self._out.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._settle_setting()
            self._drop_torn_line()
            self.records = read_records(self._path)
            sync(self._out.absolute())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release its lock. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, records: Sequence[Record]) -> None:
        """Append records. They are on the disk when this returns."""
        lines = "".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in records)
        # A lone surrogate becomes JSON's own escape.
        rest = memoryview(lines.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self.records.extend(records)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self._path}: another evaluation writes to it: wait for it, or choose another folder"
            ) from error

    def _settle_setting(self) -> None:
        path = setting_path(self._out, self._name)
        if os.fstat(self._descriptor).st_size == 0:
            replace_file(path, json.dumps(self._setting, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: cannot be read, so nobody knows what {self._path} belongs to: {error}"
            ) from error
        now = json.loads(json.dumps(self._setting))
        for field in {**before, **now}:
            if before.get(field) != now.get(field):
                raise ValueError(
                    f"{self._path}: its responses are of another setting: {field} was {before.get(field)!r}, now "
                    f"{now.get(field)!r}: choose another folder, or remove the file"
                )

    def _drop_torn_line(self) -> None:
        lines, torn = _whole_lines(self._path.read_bytes())
        if torn:
            os.ftruncate(self._descriptor, len(lines))
            _log.warning("%s: the last line was cut off (%s): dropped", self._path, counted(torn, "byte"))
