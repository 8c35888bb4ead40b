"""The published files of benchmarks, which are not shipped: ``../shared/data`` beside the clone, or ``DYPO_DATA``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

_BESIDE = Path(__file__).parents[3] / "shared" / "data"


def public_file(name: str) -> Path:
    """Return the path of a published file; skip the test if it is missing."""
    path = Path(os.environ.get("DYPO_DATA") or _BESIDE) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: DYPO_DATA names the folder with the benchmarks' files")
    return path


def public_rows(name: str) -> list[dict[str, Any]]:
    """Return the records of a published file; skip the test if it is missing."""
    path = public_file(name)
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
