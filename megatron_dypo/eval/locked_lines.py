"""Files of JSON lines that one process extends at a time, durably, and that belong to one setting."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, get_args, get_type_hints

from megatron_dypo.config.words import counted
from megatron_dypo.fs import replace_file, sync
from megatron_dypo.json_text import parse_json

_BLOCK_BYTES = 2**20

T = TypeVar("T")

_log = logging.getLogger("megatron_dypo")


def whole_lines(content: bytes) -> tuple[bytes, int]:
    """Return the lines that end, and the number of bytes of a last line that does not."""
    end = content.rfind(b"\n") + 1
    return content[:end], len(content) - end


def parse_line(line: bytes, place: str, of: type[T]) -> T:
    """Return the record of a line.

    Args:
        place: file and line, for messages.
        of: dataclass whose fields are texts, numbers, booleans or None.

    Raises:
        ValueError: the line is no object with exactly the fields of ``of``, of their types.
    """
    kinds = _kinds(of)  # type: ignore[arg-type]  # mypy doubts that a class can be hashed
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError(f"{place}: must be an object with {', '.join(kinds)}")
    for name, allowed in kinds.items():
        if type(value[name]) not in allowed:
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{place}: {name}={value[name]!r}: must be {words}")
    return of(**value)


@functools.cache
def _kinds(of: type) -> dict[str, tuple[type, ...]]:
    """Return the types that each field of a dataclass may have."""
    hints = get_type_hints(of)
    return {field.name: get_args(hints[field.name]) or (hints[field.name],) for field in dataclasses.fields(of)}


class LockedLines:
    """A file of JSON lines that this process alone extends; a context manager.

    Opening it removes a last line that was cut off.

    Args:
        path: the file; it and its folder are created where they are missing.
        setting_path: the file that keeps the setting.
        setting: what decides the lines: field → value, as JSON has it.

    Raises:
        ValueError: another process has the file open; or its lines belong to another setting, whose first field that
            differs is named.
    """

    def __init__(self, path: Path, setting_path: Path, setting: Mapping[str, Any]) -> None:
        self.path, self._setting_path, self._setting = path, setting_path, dict(setting)
        self._descriptor = -1

    def __enter__(self) -> LockedLines:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._settle_setting()
            self._drop_torn_line()
            sync(self.path.absolute().parent)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the file and its lock. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, values: Sequence[Mapping[str, Any]]) -> list[int]:
        """Add a line for each value; they are on the disk when this returns. Return where each line begins."""
        # A lone surrogate becomes JSON's own escape.
        lines = [(json.dumps(v, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace") for v in values]
        offsets = [os.fstat(self._descriptor).st_size]
        for line in lines[:-1]:
            offsets.append(offsets[-1] + len(line))
        rest = memoryview(b"".join(lines))
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        return offsets if lines else []

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path}: another process writes to it: wait for it, or choose another place"
            ) from error

    def _settle_setting(self) -> None:
        path = self._setting_path
        if os.fstat(self._descriptor).st_size == 0:
            replace_file(path, json.dumps(self._setting, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            before = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read, so nobody knows what {self.path} belongs to: {error}") from error
        now = json.loads(json.dumps(self._setting))
        for field in {**before, **now}:
            if before.get(field) != now.get(field):
                raise ValueError(
                    f"{self.path}: its responses are of another setting: {field} was {before.get(field)!r}, now "
                    f"{now.get(field)!r}: choose another place, or remove the file"
                )

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._descriptor).st_size
        end, torn = size, b""
        while end > 0 and b"\n" not in torn:
            start = max(0, end - _BLOCK_BYTES)
            torn = os.pread(self._descriptor, end - start, start) + torn
            end = start
        cut = len(torn) - (torn.rfind(b"\n") + 1)
        if cut:
            os.ftruncate(self._descriptor, size - cut)
            _log.warning("%s: the last line was cut off (%s): dropped", self.path, counted(cut, "byte"))
