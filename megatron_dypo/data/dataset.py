"""The rows of the prompt files: all checked at opening, each read again when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataFieldsConfig
from megatron_dypo.data.files import RowFile, open_rows
from megatron_dypo.data.rows import BadRow, PromptRow, parse_row

_SHOWN_PROBLEMS = 20


class PromptDataset:
    """Rows of JSONL and Parquet files by index; every row is checked at opening, and read again when asked for.

    Holds a few bytes a row, never the rows. Raises one ValueError that lists the first 20 bad rows, each with
    file, line, field, value and rule, and counts the rest; duplicate ids are bad rows too.
    """

    def __init__(self, paths: Iterable[Path | str], fields: DataFieldsConfig | None = None) -> None:
        self._fields = fields or DataFieldsConfig()
        names = self._fields
        columns = (names.prompt, names.answer, names.source, names.traces, names.id)
        self._files = [open_rows(Path(path), columns, (names.prompt, names.answer)) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files])
        self.teachers: frozenset[str] = frozenset()
        """Every teacher that some row has."""
        self._check()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._files else 0

    def __getitem__(self, row: int) -> PromptRow:
        """The row at ``row``, 0 ≤ row < len; rows follow each other in the order of files and lines."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        file, index = self._locate(row)
        try:
            return self._parse(file, index, file.read(index))
        except BadRow as bad:
            raise ValueError(f"{self._place(row)}: {bad} (the file has changed since it was opened)") from bad

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size in bytes, rows and sha256 of each file."""
        found = []
        for file in self._files:
            with file.path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found.append(
                {"name": file.path.name, "bytes": file.path.stat().st_size, "rows": len(file), "sha256": digest}
            )
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _locate(self, row: int) -> tuple[RowFile, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._files[number], row - start

    def _place(self, row: int) -> str:
        file, index = self._locate(row)
        return f"{file.path}:{file.line(index)}"

    def _parse(self, file: RowFile, index: int, record: object) -> PromptRow:
        default_id = f"{file.path.name}:{file.line(index)}"
        return parse_row(record, self._fields, default_id=default_id, default_source=file.path.stem)

    def _check(self) -> None:
        problems = _Problems()
        teachers: set[str] = set()
        digests = np.zeros(len(self), dtype=np.uint64)
        row = 0
        for file in self._files:
            for index, record in enumerate(file.scan()):
                try:
                    if isinstance(record, BadRow):
                        raise record
                    parsed = self._parse(file, index, record)
                except BadRow as bad:
                    problems.add(f"{file.path}:{file.line(index)}", bad.problems)
                    # No id: give the row a digest that is its own.
                    digests[row] = _digest(f"\0{row}")
                else:
                    teachers.update(parsed.traces)
                    digests[row] = _digest(parsed.prompt_id)
                row += 1
        self._check_ids(digests, problems)
        problems.raise_if_any()
        self.teachers = frozenset(teachers)

    def _check_ids(self, digests: npt.NDArray[np.uint64], problems: _Problems) -> None:
        order = np.argsort(digests, kind="stable")
        again = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
        for earlier, later in sorted(((int(order[i]), int(order[i + 1])) for i in again), key=lambda pair: pair[1]):
            first, second = self[earlier].prompt_id, self[later].prompt_id
            if first == second:
                rule = f"{self._fields.id}={second!r}: is the id of {self._place(earlier)} too"
                problems.add(self._place(later), (rule,))


def compare_fingerprints(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differences between two results of :meth:`PromptDataset.fingerprint`, in words."""
    if [one["name"] for one in old] != [one["name"] for one in new]:
        return [f"files {[one['name'] for one in old]} → {[one['name'] for one in new]}"]
    return [
        f"{a['name']}: {a['rows']} rows, sha256 {a['sha256'][:12]} → {b['rows']} rows, sha256 {b['sha256'][:12]}"
        for a, b in zip(old, new, strict=True)
        if a["sha256"] != b["sha256"]
    ]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Problems:
    """Broken rules in the order they were met: the first few in words, the rest as a count."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._bad_rows = 0
        self._shown_rows = 0

    def add(self, place: str, problems: Sequence[str]) -> None:
        self._bad_rows += 1
        if self._shown_rows < _SHOWN_PROBLEMS:
            self._shown_rows += 1
            self._shown += [f"  {place}: {problem}" for problem in problems]

    def raise_if_any(self) -> None:
        if not self._bad_rows:
            return
        rest = self._bad_rows - self._shown_rows
        tail = [f"  and {rest} more"] if rest else []
        raise ValueError("\n".join([f"{self._bad_rows} bad rows in the prompt files:", *self._shown, *tail]))
