"""The first and the last rows of a prompt file of any size, read in about a second."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.files import JsonlPart, RowPart, open_rows, require_kind
from megatron_dypo.data.formats import Columns, columns_of
from megatron_dypo.data.parquet_files import ParquetFile
from megatron_dypo.data.row_check.check import PartCheck, check_part
from megatron_dypo.data.source import RowParser
from megatron_dypo.data.tokenizer.open import Tokenizer

_END_BYTES = 2**20
"""Bytes that are read at each end of a JSONL file."""
_MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is looked at. Longer ones are checked only when all rows are."""
_RENDERED_ROWS = 8
"""Rows at each end that are also rendered and tokenised."""
_PARQUET_ROWS = 64
_BLOCK = 2**16


@dataclass(kw_only=True)
class Ends:
    """The findings about the rows at both ends of a file."""

    num_rows: int = 0
    """Rows that were looked at."""
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Place of each bad row → the rules that it breaks."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Length of each good row that was rendered."""
    teachers: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    """Names of :class:`~megatron_dypo.data.formats.Columns` that some of these rows have."""


def look_at_ends(
    path: Path,
    name: str,
    data: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    held_out: bool = False,
    end_bytes: int = _END_BYTES,
) -> Ends:
    """Check the rows in the first and last ``end_bytes`` of a JSONL file, or the first rows of a Parquet file.

    If the last line is longer than that, it is read whole. A few rows are also rendered and tokenised. ``name`` is the
    name of the file in ids. Raises ValueError naming the file if it cannot be used at all.
    """
    columns = columns_of(data.format, data.fields)
    if held_out:
        columns = replace(columns, traces=(), trace_checks=())
    parser = RowParser(name=name, columns=columns, keep_row=data.keep_row)
    require_kind(path)
    ends = Ends()
    for part, places in _parts(path, columns, data.keep_row, end_bytes):
        # Few are rendered: tokenising is the slow part.
        cut = min(_RENDERED_ROWS, len(places))
        _add(ends, check_part(_Rows(part, 0, cut), parser, tokenizer, data), places[:cut])
        _add(ends, check_part(_Rows(part, cut, len(places)), parser, None, data), places[cut:])
    return ends


def _add(ends: Ends, checked: PartCheck, places: Sequence[str]) -> None:
    names = list(checked.names)
    ends.num_rows += len(checked)
    ends.problems |= {places[index]: problems for index, problems in checked.problems.items()}
    ends.prompt_tokens += [count for count in checked.prompt_tokens if count >= 0]
    ends.columns |= checked.columns
    ends.teachers |= {names[index] for index in set(checked.trace_teacher)}


@dataclass(frozen=True)
class _Rows:
    """Some rows of a part."""

    part: RowPart
    start: int
    stop: int

    @property
    def lines(self) -> Sequence[int]:
        return self.part.lines[self.start : self.stop]

    def scan(self) -> Iterator[Any]:
        for index, record in enumerate(self.part.scan()):
            if index >= self.stop:
                return
            if index >= self.start:
                yield record


@dataclass(frozen=True)
class _Records:
    """Records that were read already."""

    records: Sequence[Any]

    @property
    def lines(self) -> Sequence[int]:
        return range(1, len(self.records) + 1)

    def scan(self) -> Iterator[Any]:
        yield from self.records


def _parts(path: Path, columns: Columns, keep_row: bool, end_bytes: int) -> list[tuple[RowPart, list[str]]]:
    """Return the parts to look at, each with the places of its rows."""
    if path.suffix == ".parquet":
        file = open_rows(path, None if keep_row else columns.names, (columns.prompt, columns.answer))
        assert isinstance(file, ParquetFile)
        try:
            records = file.head(_PARQUET_ROWS)
        finally:
            file.close()
        return [(_Records(records), [f"{path}:{line}" for line in range(1, len(records) + 1)])]
    try:
        size = path.stat().st_size
        with path.open("rb") as raw:
            head, end = _head(path, os.pread(raw.fileno(), end_bytes, 0), size)
            start = _last_lines_start(raw.fileno(), size, end_bytes)
            if start is None or end == size:
                return [head]
            start = max(start, end)
            return [head, _tail(path, os.pread(raw.fileno(), size - start, start), start)]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _head(path: Path, content: bytes, size: int) -> tuple[tuple[JsonlPart, list[str]], int]:
    """Return the whole lines of the file's first bytes, and where they end."""
    end = size if len(content) == size else content.rfind(b"\n") + 1
    offsets, lines = _lines_in(content[:end], 0)
    part = JsonlPart(path=path, offsets=offsets, lines=lines, is_cut=end == size and not content.endswith(b"\n"))
    return (part, [f"{path}:{line}" for line in lines]), end


def _tail(path: Path, content: bytes, start: int) -> tuple[JsonlPart, list[str]]:
    """Return the lines from ``start`` to the file's end. Their numbers are not known."""
    offsets, lines = _lines_in(content, start)
    places = [f"{path}: row {number} from the end" for number in range(len(lines), 1, -1)]
    part = JsonlPart(path=path, offsets=offsets, lines=lines, is_cut=not content.endswith(b"\n"))
    return part, [*places, *([f"{path}: the last row"] if len(lines) else [])]


def _lines_in(content: bytes, start: int) -> tuple[array[int], array[int]]:
    """Return the offsets of the lines that are not blank, followed by the end of the content, and their numbers."""
    offsets, lines = array("q"), array("I")
    offset = start
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            offsets.append(offset)
            lines.append(number)
        offset += len(line) + 1
    offsets.append(start + len(content))
    return offsets, lines


def _last_lines_start(file: int, size: int, window: int) -> int | None:
    """Return the offset of the first whole line in the file's last ``window`` bytes. If the last line is longer, return
    its own offset; None if it is too long."""
    while True:
        start = max(size - window, 0)
        if start == 0:
            return 0
        content = os.pread(file, size - start, start)
        first = content.find(b"\n")
        if first >= 0 and first + 1 < len(content):
            return start + first + 1
        if window >= _MAX_LINE_BYTES:
            return None
        window *= 4
