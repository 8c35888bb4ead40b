"""Files of (response, answer) pairs for ``megatron-dypo grade``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_dypo.config.words import counted
from megatron_dypo.data.files import RowFile, open_rows
from megatron_dypo.data.problems import Problems
from megatron_dypo.data.rows import BadRow
from megatron_dypo.grading.pairs import Pair
from megatron_dypo.grading.workers.results import shown

_MISSING = object()
_ROW_FIELDS = {"prompt": "prompt", "source": "source", "id": "prompt_id"}
"""Column → field of a verifier that gets it, if it is text. The row keeps the column too."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the columns; ``reward_model.ground_truth`` is the part of an object."""

    response: str = "response"
    answer: str = "answer"
    expected: str = "expected"
    """A person's verdict on the response: true, false, 0 or 1; null if there is none."""
    needs_expected: bool = False
    """Whether every row must have that column."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row."""

    number: int
    pair: Pair
    expected: bool | None


class PairFile:
    """A JSONL or Parquet file. Its rows are checked at opening.

    Raises ValueError listing the first 20 bad rows with file, line, field, value and rule.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path, self._fields = path, fields
        self._rows = _open(path)
        problems = Problems()
        for line in self._lines():
            if isinstance(line, str):
                problems.add(line)
        if problems:
            raise ValueError(problems.under(f"{path}: {counted(len(problems), 'bad row')}:"))
        if not len(self._rows):
            raise ValueError(f"{path}: has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self._rows.close()

    def lines(self) -> Iterator[Line]:
        """Read the rows in order."""
        for line in self._lines():
            if isinstance(line, str):
                raise ValueError(f"{line.strip()} (the file has changed since it was opened)")
            yield line

    def _lines(self) -> Iterator[Line | str]:
        for index, record in enumerate(self._records()):
            number = self._rows.line(index)
            try:
                yield _line(record, number, self._fields)
            except BadRow as bad:
                yield f"  {self.path}:{number}: {bad}"

    def _records(self) -> Iterator[Any]:
        for index in range(len(self._rows)):
            try:
                yield self._rows.read(index)
            except BadRow as bad:
                yield bad


def _open(path: Path) -> RowFile:
    columns: list[str] = []
    if path.suffix == ".parquet" and path.is_file():
        try:
            columns = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: is not a Parquet file: {error}") from error
    return open_rows(path, columns, ())


def _line(record: Any, number: int, fields: Fields) -> Line:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"{shown(record)}: must be an object")
    wanted = (fields.response, fields.answer, fields.expected)
    values = {name: _part(record, name) for name in wanted}
    missing = [name for name in (wanted if fields.needs_expected else wanted[:2]) if values[name] is _MISSING]
    if missing:
        raise BadRow(f"{', '.join(missing)}: is missing (the row has {', '.join(map(str, record)) or 'no field'})")
    response, answer = values[fields.response], values[fields.answer]
    if not isinstance(response, str):
        raise BadRow(f"{fields.response}={shown(response)}: must be a string")
    if answer is None:
        raise BadRow(f"{fields.answer}=None: must not be null")
    return Line(
        number=number,
        pair=Pair(
            response=response,
            answer=answer,
            row={name: value for name, value in record.items() if name not in wanted},
            **{
                field: record[name]
                for name, field in _ROW_FIELDS.items()
                if isinstance(record.get(name), str) and name not in wanted
            },
        ),
        expected=_expected(values[fields.expected], fields.expected),
    )


def _part(record: dict[str, Any], name: str) -> Any:
    """The column ``name``; without one, the part of an object that a dotted name says; else _MISSING."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inner = record.get(head)
    return _part(inner, rest) if dot and isinstance(inner, dict) else _MISSING


def _expected(value: Any, name: str) -> bool | None:
    if value is None or value is _MISSING:
        return None
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadRow(f"{name}={shown(value)}: must be true, false, 0, 1 or null")
