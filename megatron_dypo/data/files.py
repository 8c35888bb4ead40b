"""Random access to the rows of JSONL and Parquet files, without holding them in memory."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from megatron_dypo.data.rows import BadRow


class RowFile(Protocol):
    """Rows of one file, by index."""

    path: Path

    def __len__(self) -> int: ...

    def line(self, index: int) -> int:
        """1-based line (JSONL) or row (Parquet) of a row."""

    def read(self, index: int) -> Any:
        """The record at ``index``. Raises :class:`BadRow` where the file holds none there."""

    def scan(self) -> Iterator[Any]:
        """Every record in order; a :class:`BadRow` in place of one that cannot be read."""

    def close(self) -> None: ...


def open_rows(path: Path, columns: Collection[str], required: Collection[str]) -> RowFile:
    """Open a ``.jsonl`` or ``.parquet`` file. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        return JsonlFile(path)
    if path.suffix == ".parquet":
        return ParquetFile(path, columns, required)
    raise ValueError(f"{path}: must end in .jsonl or .parquet")


class JsonlFile:
    """One JSON value a line; the index is a byte offset and a line number for each line that is not blank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("q"), array("q")
        self._file = path.open("rb")
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                self._offsets.append(offset)
                self._lines.append(number)
            offset += len(line)
        self._end = offset

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, index: int) -> int:
        return self._lines[index]

    def read(self, index: int) -> Any:
        start = self._offsets[index]
        end = self._offsets[index + 1] if index + 1 < len(self._offsets) else self._end
        # pread leaves the shared file position alone: safe from any thread.
        raw = os.pread(self._file.fileno(), end - start, start)
        try:
            return json.loads(raw.rstrip().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRow(f"byte {error.start} of the line is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise BadRow(f"is not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise BadRow("is nested too deeply") from error

    def scan(self) -> Iterator[Any]:
        for index in range(len(self)):
            try:
                yield self.read(index)
            except BadRow as bad:
                yield bad

    def close(self) -> None:
        self._file.close()


_CACHED_BYTES = 512 * 2**20
"""Row groups that a Parquet file keeps in memory, as Arrow tables; one group is kept whatever its size."""


class ParquetFile:
    """Reads only the columns that are asked for; keeps the row groups used last."""

    def __init__(self, path: Path, columns: Collection[str], required: Collection[str]) -> None:
        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: is not a Parquet file: {error}") from error
        present = self._file.schema_arrow.names
        missing = [name for name in required if name not in present]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(present)}")
        self._columns = [name for name in present if name in columns]
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Any:
        group = bisect.bisect_right(self._starts, index) - 1
        return _plain(self._group(group).slice(index - self._starts[group], 1).to_pylist()[0])

    def scan(self) -> Iterator[Any]:
        for batch in self._file.iter_batches(batch_size=1024, columns=self._columns):
            yield from map(_plain, batch.to_pylist())

    def close(self) -> None:
        self._file.close()

    def _group(self, group: int) -> pyarrow.Table:
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group, columns=self._columns)
            while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _CACHED_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Arrow maps come as lists of pairs: make them dicts, as JSON has them."""
    return {
        name: dict(value) if isinstance(value, list) and value and isinstance(value[0], tuple) else value
        for name, value in record.items()
    }
