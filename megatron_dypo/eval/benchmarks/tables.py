"""Read the rows of a published file: JSONL, Parquet, JSON (a list of objects) or CSV."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dypo.data.files import open_rows
from megatron_dypo.data.rows import BadRow
from megatron_dypo.data.values import Broken, parse_json

KINDS = (".jsonl", ".parquet", ".json", ".csv")

Rows = Iterator[tuple[str, Any]]
"""Yields (``file:line``, the record or a :class:`BadRow`)."""


def read_table(path: Path) -> Rows:
    """Yield the rows of a file, each with its place.

    Raises:
        ValueError: the file cannot be read, or its ending is not one of ``KINDS``.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: must end in {', '.join(KINDS)}")
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder: name its file' if path.is_dir() else 'no such file'}")
    reader = {".json": _json_rows, ".csv": _csv_rows}.get(path.suffix, _prompt_rows)
    return reader(path)


def _prompt_rows(path: Path) -> Rows:
    with contextlib.closing(open_rows(path, None, ())) as rows:
        index = 0
        for part in rows.parts(2**23):
            for record in part.scan():
                yield f"{path}:{rows.line(index)}", record
                index += 1


def _json_rows(path: Path) -> Rows:
    try:
        value = parse_json(_text(path))
    except Broken as broken:
        raise ValueError(f"{path}: {broken.rule}") from broken
    if not isinstance(value, list):
        raise ValueError(f"{path}: must be a list of objects; a file with an object in each line ends in .jsonl")
    for number, record in enumerate(value, start=1):
        yield f"{path}: row {number}", record


def _csv_rows(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                yield (
                    place,
                    BadRow(f"the row has another number of fields than the header, {len(reader.fieldnames or ())}"),
                )
            else:
                yield place, record
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: is not CSV: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # keeps line ends inside a field
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
