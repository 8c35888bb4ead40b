"""JSON that is nested deeper than Python can follow is a damaged file like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.data.array_files import write_arrays
from megatron_dypo.data.row_check.bad_rows import _lines_of_others
from megatron_dypo.data.row_check.cache import _ARRAYS, read_check
from megatron_dypo.eval.locked_lines import parse_line
from megatron_dypo.json_text import parse_json
from megatron_dypo.launch.run_lock import NAME as LOCK
from megatron_dypo.launch.run_lock import read_holder
from megatron_dypo.loop.journal import records
from megatron_dypo.mcore.checkpoints.folder import STATE, find_latest
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST, read_manifest
from megatron_dypo.mcore.checkpoints.parts import read_header
from megatron_dypo.metrics.declared import DECLARED_FILE, read_declared
from megatron_dypo.metrics.planned import PLANNED_FILE, read_planned
from megatron_dypo.metrics.probe_files import FOLDER
from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.metrics.report.page import SUMMARY_FILE, _read_json
from megatron_dypo.metrics.report.probes import read_probes
from megatron_dypo.metrics.samples import read_samples
from megatron_dypo.metrics.status import NAME as STATUS
from megatron_dypo.metrics.status import read_status
from megatron_dypo.probe.scores import _read_notes
from megatron_dypo.processes.heartbeats import heartbeat_path, read_heartbeat
from megatron_dypo.refit.answers import checked

DEEP = "[" * 200_000
REFUSED: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda run: read_metrics(run / "metrics.jsonl"),
    "samples/step_000001.jsonl": lambda run: list(read_samples(run)),
    DECLARED_FILE: read_declared,
    PLANNED_FILE: read_planned,
    SUMMARY_FILE: lambda run: _read_json(run / SUMMARY_FILE),
    f"{FOLDER}/step_000001.json": read_probes,
    STATE: read_header,
    MANIFEST: read_manifest,
}
UNREAD: dict[str, Callable[[Path], object]] = {
    STATUS: read_status,
    LOCK: read_holder,
    str(heartbeat_path(Path(), 0)): lambda run: read_heartbeat(run, 0),
    f"step_000001/{STATE}": find_latest,
    "bad_rows.jsonl": lambda run: _lines_of_others(run / "bad_rows.jsonl", set()) or None,
}


def put(run: Path, name: str) -> None:
    (run / "metrics.jsonl").touch()
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(DEEP + "\n")


@pytest.mark.parametrize("name", REFUSED)
def test_a_deep_file_is_named_by_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    put(tmp_path, name)
    with pytest.raises(ValueError, match=r"nested too deeply") as caught:
        REFUSED[name](tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", UNREAD)
def test_a_deep_file_counts_as_one_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    put(tmp_path, name)
    assert UNREAD[name](tmp_path) is None


def test_deep_texts_of_other_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^responses:1: not a JSON object: nested too deeply$"):
        parse_line(DEEP.encode(), "responses:1", records.Start)
    with pytest.raises(ValueError, match=r"^an unknown record of a journal: nested too deeply$"):
        records.load(b"J" + DEEP.encode())
    with pytest.raises(ValueError, match=r"^notes: must be JSON: nested too deeply$"):
        _read_notes(np.frombuffer(DEEP.encode(), np.uint8))
    assert checked("refit", "url", 200, DEEP) == {}


def test_a_row_check_with_deep_notes_is_made_again(tmp_path: Path) -> None:
    path, arrays = tmp_path / "check.npz", dict.fromkeys(_ARRAYS, np.zeros(1))
    write_arrays(path, {**arrays, "notes": np.frombuffer(DEEP.encode(), np.uint8)})
    assert read_check(path) is None


def test_other_texts_are_read_as_json_reads_them() -> None:
    text = json.dumps({"a": [1, 2.5, None, "é"]})
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        parse_json("{")
