"""Random access to the rows of a Parquet file, one row group at a time."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_dypo.data.rows import BadRow
from megatron_dypo.data.values import shown

CACHED_BYTES = 512 * 2**20
"""Bytes of row groups that are kept in memory as Arrow tables. At least one group is kept, of any size."""
_BATCH_ROWS = 1024
"""Number of rows that are converted to Python objects at a time."""
_UNREADABLE = (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError)
"""Exceptions that pyarrow raises for damaged bytes: its own errors, OSError for compression and Thrift, the others for
values."""


class ParquetFile:
    """A Parquet file. Only requested columns are read, and the last used row groups are kept in memory."""

    def __init__(self, path: Path, columns: Collection[str] | None, required: Collection[str]) -> None:
        self.path = path
        self._file = _open(path)
        try:
            metadata = self._file.metadata
            present = self._file.schema_arrow.names
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except _UNREADABLE as error:
            raise ValueError(f"{path}: is damaged: {error}") from error
        if sum(sizes) != metadata.num_rows or min(sizes, default=0) < 0:
            raise ValueError(
                f"{path}: is damaged: its row groups have {sizes} rows, its footer says {metadata.num_rows}"
            )
        twice = sorted({name for name in present if present.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: has the column {twice[0]} twice")
        missing = [name for name in required if _column_of(name, present) is None]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(present)}")
        used = present if columns is None else {_column_of(name, present) for name in columns}
        self._columns = [name for name in present if name in used]
        self._starts: list[int] = [0, *itertools.accumulate(sizes)]
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Any:
        group = bisect.bisect_right(self._starts, index) - 1
        return _record(self._group(group).slice(index - self._starts[group], 1))

    def scan(self) -> Iterator[Any]:
        for part in self.parts(0):
            yield from part.scan()

    def parts(self, size: int) -> list[ParquetPart]:
        # Parquet can only read whole row groups.
        return [
            ParquetPart(path=self.path, group=group, start=start, stop=stop, columns=self._columns)
            for group, (start, stop) in enumerate(itertools.pairwise(self._starts))
        ]

    def close(self) -> None:
        self._file.close()

    def head(self, count: int) -> list[Any]:
        """Read the first records without the rest of their row group; a :class:`BadRow` for an invalid record.

        Raises ValueError if the file is damaged there.
        """
        try:
            batches = self._file.iter_batches(batch_size=count, columns=self._columns)
            return list(_records(pyarrow.Table.from_batches([next(batches)])))
        except (*_UNREADABLE, StopIteration) as error:
            raise ValueError(f"{self.path}: its first rows cannot be read, the file is damaged: {error}") from error

    def _group(self, group: int) -> pyarrow.Table:
        if group not in self._groups:
            start, stop = self._starts[group : group + 2]
            part = ParquetPart(path=self.path, group=group, start=start, stop=stop, columns=self._columns)
            self._groups[group] = part.table(self._file)
            while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > CACHED_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


@dataclass(frozen=True, kw_only=True)
class ParquetPart:
    """One row group."""

    path: Path
    group: int
    start: int
    """Index in the file of its first row."""
    stop: int
    columns: list[str]

    @property
    def lines(self) -> Sequence[int]:
        return range(self.start + 1, self.stop + 1)

    def scan(self) -> Iterator[Any]:
        """Yield every record, or a :class:`BadRow` for a record with an invalid value.

        Raises ValueError with file, row group and rows if the group is damaged, since then none of its rows is known.
        """
        with _open(self.path) as file:
            table = self.table(file)
        for start in range(0, table.num_rows, _BATCH_ROWS):
            yield from _records(table.slice(start, _BATCH_ROWS))

    def table(self, file: pyarrow.parquet.ParquetFile) -> pyarrow.Table:
        """Read the group. Raises ValueError where it is damaged."""
        place = f"{self.path}: row group {self.group} (rows {self.start + 1} to {self.stop})"
        try:
            table = file.read_row_group(self.group, columns=self.columns)
            table.validate()
        except _UNREADABLE as error:
            raise ValueError(f"{place} cannot be read, the file is damaged: {error}") from error
        if table.num_rows != self.stop - self.start:
            raise ValueError(f"{place} holds {table.num_rows} rows, the file is damaged")
        return table


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: is not a Parquet file: {error}") from error


def _column_of(name: str, present: Collection[str]) -> str | None:
    """Return the column that holds a field: itself, or for ``a.b`` the column ``a``."""
    while name not in present:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def _records(batch: pyarrow.Table) -> Iterator[Any]:
    try:
        yield from [_plain(record) for record in batch.to_pylist()]
        return
    except (pyarrow.ArrowException, ValueError, OverflowError):
        pass  # one of them is bad: find out which
    for index in range(batch.num_rows):
        try:
            yield _record(batch.slice(index, 1))
        except BadRow as bad:
            yield bad


def _record(row: pyarrow.Table) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = _plain(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} of a text is not UTF-8") from error
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise BadRow(f"has a value that cannot be read: {error}") from error
    return plain


def _plain(value: Any) -> Any:
    """Turn Arrow maps, which are lists of pairs, into dicts as in JSON."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], tuple):
        members = {name: _plain(item) for name, item in value}
        if len(members) < len(value):
            raise ValueError(f"a map has a key twice: {shown([name for name, _ in value])}")
        return members
    return [_plain(item) for item in value]
