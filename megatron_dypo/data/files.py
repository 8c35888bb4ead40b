"""Random access to the rows of JSONL and Parquet files, without loading the files into memory."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from megatron_dypo.data.file_index import FileIndex, IndexFiles
from megatron_dypo.data.parquet_files import ParquetFile
from megatron_dypo.data.rows import BadRow
from megatron_dypo.data.values import Broken, parse_json


class RowPart(Protocol):
    """A run of rows of one file, which another process can read."""

    @property
    def lines(self) -> Sequence[int]:
        """1-based line (JSONL) or row (Parquet) of each row."""

    def scan(self) -> Iterator[Any]:
        """Yield every record in order, or a :class:`BadRow` for a record that cannot be read."""


class RowFile(Protocol):
    """Rows of one file, by index."""

    path: Path

    def __len__(self) -> int: ...

    def line(self, index: int) -> int:
        """Return the 1-based line (JSONL) or row (Parquet) of a row."""

    def read(self, index: int) -> Any:
        """Return the record at ``index``. Raises :class:`BadRow` if there is no valid record."""

    def parts(self, size: int) -> Sequence[RowPart]:
        """Return the whole file in parts of about ``size`` bytes."""

    def close(self) -> None: ...


_MAGICS = {
    b"version https://git-lfs.github.com/spec/": "is a git-lfs pointer: run `git lfs pull`",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"\xff\xfe": "is text in UTF-16: must be UTF-8",
    b"\xfe\xff": "is text in UTF-16: must be UTF-8",
}


def open_rows(
    path: Path, columns: Collection[str] | None, required: Collection[str], indexes: IndexFiles | None = None
) -> RowFile:
    """Open a ``.jsonl`` or ``.parquet`` file. Raises ValueError naming the file.

    A JSONL file is read from beginning to end unless ``indexes`` has its index. Of a Parquet file only ``columns`` are
    read (None: all); it must have the ``required`` ones.
    """
    require_kind(path)
    try:
        rows: RowFile = (
            JsonlFile(path, indexes or IndexFiles(None))
            if path.suffix == ".jsonl"
            else ParquetFile(path, columns, required)
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(rows) == 0:
        raise ValueError(f"{path}: has no rows")
    return rows


def require_output(out: Path, source: Path, what: str) -> None:
    """Raise ValueError unless rows that are made from ``source`` (for messages: ``what``) can be written to ``out``."""
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: must end in .jsonl")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: must be a file in a folder that is there")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out}: is {what} itself: give another name")


def require_kind(path: Path) -> None:
    """Raise ValueError naming the file unless its name and its first bytes suit a prompt file."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: must end in .jsonl or .parquet")
    try:
        if not path.is_file():
            raise ValueError(f"{path}: {'is a folder: name its files' if path.is_dir() else 'no such file'}")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise ValueError(f"{path}: is empty, it has no rows")
    for magic, problem in _MAGICS.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: {problem}")
    if path.suffix == ".jsonl" and start.startswith(b"PAR1"):
        raise ValueError(f"{path}: is a Parquet file: its name must end in .parquet")


class JsonlFile:
    """A file with one JSON value per line. Its index has byte offset and number of each line that is not blank."""

    def __init__(self, path: Path, indexes: IndexFiles) -> None:
        self.path = path
        self._file = path.open("rb")
        self.key = indexes.key(path, self._file.fileno())
        """The state of the file before it was read."""
        self.index = indexes.find(path, self._file.fileno()) or _index_of(self._file)

    def __len__(self) -> int:
        return len(self.index.offsets) - 1

    def line(self, index: int) -> int:
        return int(self.index.lines[index]) if len(self.index.lines) else index + 1

    def read(self, index: int) -> Any:
        start, end = self.index.offsets[index : index + 2].tolist()
        # pread does not change the shared file position, so any thread may use it.
        raw = os.pread(self._file.fileno(), end - start, start)
        return _record(raw, is_first=start == 0, is_cut=self.index.is_open_ended and index == len(self) - 1)

    def parts(self, size: int) -> list[JsonlPart]:
        parts = []
        offsets = self.index.offsets
        start = 0
        while start < len(self):
            # As many whole rows as fit, at least one.
            stop = int(np.searchsorted(offsets, offsets[start] + size, side="right")) - 1
            stop = min(max(stop, start + 1), len(self))
            lines = self.index.lines[start:stop]
            part = JsonlPart(
                path=self.path,
                offsets=array("q", offsets[start : stop + 1].tobytes()),
                lines=array("I", lines.tobytes()) if len(lines) else range(start + 1, stop + 1),
                is_cut=self.index.is_open_ended and stop == len(self),
            )
            parts.append(part)
            start = stop
        return parts

    def close(self) -> None:
        self._file.close()


def _index_of(file: BinaryIO) -> FileIndex:
    """Read a file from its beginning, and find its lines that are not blank."""
    offsets, lines = array("q"), array("I")
    offset = number = 0
    line = b"\n"
    for number, line in enumerate(file, start=1):
        if line.strip():
            offsets.append(offset)
            lines.append(number)
        offset += len(line)
    offsets.append(offset)
    return FileIndex(
        offsets=np.asarray(offsets, np.int64),
        lines=np.asarray(lines if len(lines) < number else (), np.uint32),
        is_open_ended=not line.endswith(b"\n"),
    )


@dataclass(frozen=True, kw_only=True)
class JsonlPart:
    """Some of the lines of a JSONL file."""

    path: Path
    offsets: array[int]
    """Offset of each row, followed by the end of the last row."""
    lines: Sequence[int]
    is_cut: bool
    """Whether the last row ends without a line break."""

    def scan(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for index, (start, end) in enumerate(itertools.pairwise(self.offsets)):
                raw = os.pread(file.fileno(), end - start, start)
                try:
                    yield _record(raw, is_first=start == 0, is_cut=self.is_cut and index == len(self.offsets) - 2)
                except BadRow as bad:
                    yield bad


def _record(raw: bytes, *, is_first: bool, is_cut: bool) -> Any:
    """Read the JSON of one line. ``is_cut``: whether the file ends there without a line break."""
    try:
        # Editors on Windows put a byte order mark before the first line.
        return parse_json(raw.rstrip().decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} of the line is not UTF-8") from error
    except Broken as broken:
        is_cut = is_cut and broken.rule.startswith("is not JSON")  # other rules concern a complete value
        end = "; the file ends here, without a line break: it may have been cut off" if is_cut else ""
        raise BadRow(f"{broken.rule}{end}") from broken
