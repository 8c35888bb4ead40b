"""Results of the row check in files of the run folder, named by a hash of everything that they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo import __version__
from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.array_files import read_arrays, write_arrays
from megatron_dypo.data.row_check.check import RowsChecked
from megatron_dypo.data.source import RowSource
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.json_text import parse_json

log = logging.getLogger(__name__)

CHECK_FOLDER = "data_check"
_CHECK_VERSION = 1
"""Version of the check. Increase it when the check of a row gives another result."""
_LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")
_NOT_CHECKED = (
    *("prompts", "format", "fields", "teachers", "drop_wrong_traces", "on_bad_row"),
    *("max_prompt_tokens", "max_trace_tokens", "shuffle"),
)
"""Fields of :class:`DataConfig` that the check does not read, or whose effect is hashed in another way."""
_ARRAYS = ("prompt_tokens", "trace_start", "trace_teacher", "trace_tokens", "verifier", "source", "is_object")
_NAMES = ("teachers", "verifiers", "sources", "columns")


def check_hash(source: RowSource, tokenizer: Tokenizer, data: DataConfig) -> str:
    """Hash everything a check depends on: contents and names of files, columns, template and tokenizer, versions."""
    parts = {
        "check": _CHECK_VERSION,
        "versions": [__version__, *(importlib.metadata.version(library) for library in _LIBRARIES)],
        "files": list(zip(source.names, source.hashes, strict=True)),
        "columns": dataclasses.asdict(source.columns),
        "data": {key: value for key, value in dataclasses.asdict(data).items() if key not in _NOT_CHECKED},
        "tokenizer": tokenizer_files(tokenizer),
        "stop_ids": list(tokenizer.eos_ids),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return file → SHA-256 for the files of a tokenizer, its chat template included."""
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        tokenizer.save(Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_check(path: Path) -> RowsChecked | None:
    """Read the result of an earlier check; None if there is none, or (with a warning) if it is damaged."""
    arrays = read_arrays(path, (*_ARRAYS, "notes"))
    if arrays is None:
        return None
    try:
        return _from_arrays(arrays)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): checking again", path, error)
        return None


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> RowsChecked:
    notes = parse_json(arrays["notes"].tobytes())
    kept: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    kept |= {name: tuple(notes[name]) for name in _NAMES}
    return RowsChecked(
        **kept,
        num_failed_checks=notes["num_failed_checks"],
        problems={int(row): tuple(problems) for row, problems in notes["problems"].items()},
    )


def write_check(path: Path, checked: RowsChecked) -> None:
    """Write the result of a check, whole or not at all."""
    notes = {
        **{name: getattr(checked, name) for name in _NAMES},
        "num_failed_checks": checked.num_failed_checks,
        "problems": checked.problems,
    }
    arrays = {name: getattr(checked, name) for name in _ARRAYS}
    write_arrays(path, {**arrays, "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)})
