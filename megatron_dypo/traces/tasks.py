"""The prompts that teachers are asked: each different prompt of a file once, even if several rows have it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.grading import BUILT_IN_VERIFIERS
from megatron_dypo.config.words import counted
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.problems import Problems
from megatron_dypo.data.rows import BadRow, PromptRow
from megatron_dypo.data.source import RowSource
from megatron_dypo.data.values import shown
from megatron_dypo.grading.naming import verifier_of
from megatron_dypo.metrics.progress import progress
from megatron_dypo.traces.config import TraceCommandConfig

_PART_BYTES = 8 * 2**20


class Tasks:
    """The different prompts of a file, by number. A task is a prompt with its answer and its verifier.

    It keeps some bytes for each row in memory, not the rows.

    Args:
        path: JSONL or Parquet file.
        teachers: names of teachers; a row may have traces of them already.

    Raises:
        ValueError: the file cannot be read, or rows break rules. The message names each bad row with file, line, field,
            value and rule.
    """

    def __init__(self, path: Path, cfg: TraceCommandConfig, teachers: Collection[str], *, show_progress: bool) -> None:
        columns = columns_of(cfg.data.format, cfg.data.fields)
        self._cfg = cfg
        self.source = RowSource([path], columns, keep_row=True, show_progress=show_progress)
        self._number_of: dict[bytes, int] = {}
        self._first_rows, self._of_row = array("Q"), array("Q")
        self._lacking = {name: bytearray() for name in teachers}
        self.verifiers: set[str] = set()
        """Verifiers that rows name in their own column."""
        with progress(len(self.source), "reading prompts", "rows", enabled=show_progress) as bar:
            problems = Problems()
            for place, row in self._rows():
                bar.update(1)
                if isinstance(row, BadRow):
                    problems.add(f"  {place}: {row}")
                else:
                    self._add(row)
        if problems:
            raise ValueError(problems.under(f"{counted(len(problems), 'bad row')} in the prompt file:"))

    def __len__(self) -> int:
        return len(self._first_rows)

    def row(self, number: int) -> PromptRow:
        """Return the first row of a task."""
        return self.source.row(self._first_rows[number])

    def of_row(self, index: int) -> int:
        """Return the task of a row of the file."""
        return self._of_row[index]

    def find(self, key: bytes) -> int | None:
        """Return the task with the given key; None if the file has none."""
        return self._number_of.get(key)

    def lacking(self, teacher: str) -> npt.NDArray[np.bool_]:
        """Return for each task whether the file has a row of it without a trace of the teacher."""
        return np.frombuffer(self._lacking[teacher], np.bool_)

    def _rows(self) -> Iterator[tuple[str, PromptRow | BadRow]]:
        index = 0
        for parser, part in self.source.parts(_PART_BYTES):
            for line, record in zip(part.lines, part.scan(), strict=True):
                try:
                    yield self.source.place(index), self._checked(parser.parse(line, _whole(record)))
                except BadRow as bad:
                    yield self.source.place(index), bad
                index += 1

    def _checked(self, row: PromptRow) -> PromptRow:
        try:
            verifier = verifier_of(self._cfg.grading, own=row.verifier, source=row.source)
        except ValueError as error:
            raise BadRow(str(error)) from error
        if verifier in BUILT_IN_VERIFIERS and not isinstance(row.answer, str):
            raise BadRow(f"answer={shown(row.answer)}: must be text for the verifier {verifier}")
        for name, value in row.row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise BadRow(
                    f"{name}={shown(value)}: is no value of JSON: leave the column out, or write text"
                ) from error
        return row

    def _add(self, row: PromptRow) -> None:
        number = self._number_of.setdefault(task_key(row), len(self._first_rows))
        if number == len(self._first_rows):
            self._first_rows.append(len(self._of_row))
            for lacking in self._lacking.values():
                lacking.append(False)
        self._of_row.append(number)
        if row.verifier is not None:
            self.verifiers.add(row.verifier)
        for name, lacking in self._lacking.items():
            lacking[number] |= name not in row.traces


def task_key(row: PromptRow) -> bytes:
    """Return a hash of a row's prompt, answer, verifier and source; it stays the same when the file's rows move."""
    text = json.dumps([row.prompt, row.answer, row.verifier, row.source], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:16]


def _whole(record: Any) -> Any:
    if isinstance(record, BadRow):
        raise record
    return record
