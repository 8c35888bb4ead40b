"""The prompt files of one data set: place and name of each row, and whether the files have changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dypo.data.file_index import IndexFiles, only_digest
from megatron_dypo.data.files import JsonlFile, RowFile, RowPart, open_rows
from megatron_dypo.data.formats import Columns
from megatron_dypo.data.rows import BadRow, PromptRow, parse_row
from megatron_dypo.fs import hash_file
from megatron_dypo.metrics.progress import progress


@dataclass(frozen=True, kw_only=True)
class RowParser:
    """Parses the records of one file. It can be sent to another process."""

    name: str
    """Name of the file in ids and sources."""
    columns: Columns
    keep_row: bool

    def parse(self, line: int, record: object) -> PromptRow:
        """Check the record of a line. Raises :class:`BadRow`."""
        return parse_row(
            record,
            self.columns,
            default_id=f"{self.name}:{line}",
            default_source=self.name.removesuffix(Path(self.name).suffix),
            keep_row=self.keep_row,
        )


class RowSource:
    """Rows of JSONL and Parquet files by index, in the order of files and lines, bad rows included.

    Only a few bytes for each row are kept in memory. Raises ValueError naming a file that cannot be used.
    """

    def __init__(
        self,
        paths: Iterable[Path | str],
        columns: Columns,
        *,
        keep_row: bool,
        show_progress: bool = False,
        index_folder: Path | None = None,
    ) -> None:
        self.columns = columns
        files = [Path(path) for path in paths]
        read = None if keep_row else columns.names
        indexes, required = IndexFiles(index_folder), (columns.prompt, columns.answer)
        self.files: list[RowFile] = [open_rows(path, read, required, indexes) for path in files]
        self.names = distinct_names(files)
        """Name of each file in ids, with names of its folders if two files have the same name."""
        self._parsers = [RowParser(name=name, columns=columns, keep_row=keep_row) for name in self.names]
        _require_once(files)
        # Keep the files open: if a file is replaced, this run still reads the old one.
        self._handles = [path.open("rb") for path in files]
        self._stats = [_stat(handle) for handle in self._handles]
        self._ends = np.cumsum([len(file) for file in self.files], dtype=np.int64)
        total = sum(size for size, _ in self._stats)
        with progress(total, "hashing prompt files", "bytes", enabled=show_progress) as bar:
            opened = zip(self.files, self._handles, strict=True)
            self.hashes = [_digest(file, handle, indexes, bar.update) for file, handle in opened]
            """SHA-256 of each file, in hexadecimal."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.files else 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [size for size, _ in self._stats]

    def row(self, index: int) -> PromptRow:
        """Read a row. Raises ValueError if its file has changed."""
        number, inside = self._locate(index)
        file = self.files[number]
        self._require_unchanged(number, self.place(index))
        try:
            return self._parsers[number].parse(file.line(inside), file.read(inside))
        except BadRow as bad:
            raise ValueError(f"{self.place(index)}: {bad} (the file has changed since it was opened)") from bad

    def place(self, index: int) -> str:
        """``file:line`` of a row."""
        number, inside = self._locate(index)
        return f"{self.files[number].path}:{self.files[number].line(inside)}"

    def file_and_line(self, index: int) -> tuple[Path, int]:
        """Return the file of a row and its 1-based line (JSONL) or row (Parquet)."""
        number, inside = self._locate(index)
        return self.files[number].path, self.files[number].line(inside)

    def parts(self, size: int) -> list[tuple[RowParser, RowPart]]:
        """Return all rows, in their order, in parts of about ``size`` bytes."""
        files = zip(self._parsers, self.files, strict=True)
        return [(parser, part) for parser, file in files for part in file.parts(size)]

    def require_unchanged(self) -> None:
        """Raise ValueError naming the first file whose content, as another process would read it, has changed."""
        for number, (file, handle) in enumerate(zip(self.files, self._handles, strict=True)):
            try:
                is_same = os.path.samestat(file.path.stat(), os.fstat(handle.fileno()))
            except OSError as error:
                raise ValueError(f"{file.path}: cannot be read any more: {error.strerror}") from error
            if not is_same:
                raise ValueError(f"{file.path}: the file was replaced by another while its rows were checked")
            self._require_unchanged(number, str(file.path))

    def close(self) -> None:
        for file, handle in zip(self.files, self._handles, strict=True):
            file.close()
            handle.close()

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def _require_unchanged(self, number: int, place: str) -> None:
        now = _stat(self._handles[number])
        if now == self._stats[number]:
            return
        # The time alone may change, by a copy or touch.
        if now[0] != self._stats[number][0] or hash_file(self._handles[number]) != self.hashes[number]:
            raise ValueError(f"{place}: the file has changed since it was opened")
        self._stats[number] = now


def distinct_names(paths: list[Path]) -> list[str]:
    """Name each file by the shortest end of its path that distinguishes it from the other files."""
    wholes = [path.absolute() for path in paths]
    names = []
    for path in wholes:
        others = [other for other in wholes if other != path]
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in others) and length < len(path.parts):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names


def _require_once(files: list[Path]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for path in files:
        stat = path.stat()
        first = seen.setdefault((stat.st_dev, stat.st_ino), path)
        if first is not path:
            raise ValueError(f"{path}: is the same file as {first}: name each once")


def _digest(file: RowFile, handle: BinaryIO, indexes: IndexFiles, update: Callable[[int], object]) -> str:
    """Return the SHA-256 of a file, and keep its index if it has none."""
    path, descriptor = file.path, handle.fileno()
    if known := indexes.find(path, descriptor):
        return known.sha256
    if isinstance(file, JsonlFile):
        key, index = file.key, file.index
    else:
        key, index = indexes.key(path, descriptor), only_digest(os.fstat(descriptor).st_size)
    digest = hash_file(handle, update)
    indexes.keep(path, descriptor, replace(index, sha256=digest), key)
    return digest


def _stat(handle: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(handle.fileno())
    return stat.st_size, stat.st_mtime_ns
