"""A file's index: it has the same rows as the file, it is read in place of the file, and a change makes it void."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.data import file_index, files, source
from megatron_dypo.data.file_index import IndexFiles
from megatron_dypo.data.files import JsonlFile
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.source import RowSource
from megatron_dypo.fs import hash_file

CONTENTS = {
    "lines": b'{"a": 1}\n{"a": 22}\n{"a": 3}\n',
    "open end": b'{"a": 1}\n{"a": 22}',
    "blank lines": b'\n  \n{"a": 1}\n\n\t\n{"a": 22}\r\n \n{"a": 3}\n\n',
    "blank open end": b'{"a": 1}\n\n{"a": 22}\n  ',
    "one row": b"7",
}


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "_SETTLED_S", -1.0)


def open_source(path: Path, folder: Path | None) -> RowSource:
    columns = columns_of(DataConfig().format, DataFieldsConfig())
    return RowSource([path], columns, keep_row=False, index_folder=folder)


def keep_index(path: Path, folder: Path) -> None:
    open_source(path, folder).close()


def write_rows(path: Path, count: int = 5) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": f"{i}"}) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_with_its_index_has_the_same_rows_lines_and_parts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENTS[name])
    expected = [(n, line) for n, line in enumerate(CONTENTS[name].split(b"\n"), start=1) if line.strip()]
    keep_index(path, tmp_path / "index")
    indexes = IndexFiles(tmp_path / "index")
    for one in (JsonlFile(path, IndexFiles(None)), JsonlFile(path, indexes)):
        assert [(one.line(i), one.read(i)) for i in range(len(one))] == [(n, json.loads(text)) for n, text in expected]
        for size in (0, 10, 19, 2**20):
            parts = one.parts(size)
            assert [record for part in parts for record in part.scan()] == [json.loads(text) for _, text in expected]
            assert [line for part in parts for line in part.lines] == [n for n, _ in expected]
        assert one.index.is_open_ended is not CONTENTS[name].endswith(b"\n")
        one.close()


def test_a_second_reader_neither_scans_nor_hashes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    first = open_source(path, tmp_path / "index")

    def fail(*_: object) -> None:
        raise AssertionError("the whole file is read")

    monkeypatch.setattr(files, "_index_of", fail)
    monkeypatch.setattr(source, "hash_file", fail)
    second = open_source(path, tmp_path / "index")
    assert (second.hashes, len(second), second.row(4).prompt) == (first.hashes, 5, "p4")
    with pytest.raises(AssertionError, match="whole file"):
        open_source(path, None)


def test_a_parquet_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "answer": ["1", "2"]}), path)
    first = open_source(path, tmp_path / "index")
    monkeypatch.setattr(source, "hash_file", lambda *_: "another")
    second = open_source(path, tmp_path / "index")
    assert (second.hashes, len(second), second.row(1).prompt) == (first.hashes, 2, "b")


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    before = open_source(path, tmp_path / "index")
    stat = path.stat()
    path.write_text(path.read_text().replace("p3", "q3"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = open_source(path, tmp_path / "index")
    assert after.row(3).prompt == "q3"
    assert after.hashes != before.hashes


def test_a_file_that_has_just_changed_gets_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "_SETTLED_S", 1000.0)
    keep_index(write_rows(tmp_path / "rows.jsonl"), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_file_that_changes_while_it_is_read_gets_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl")

    def change(*arguments: object) -> str:
        with path.open("a") as file:
            file.write('{"prompt": "new", "answer": "1"}\n')
        return hash_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "hash_file", change)
    keep_index(path, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_damaged_index_is_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 100)
    keep_index(path, tmp_path / "index")
    (file,) = (tmp_path / "index").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF  # in the offsets
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        opened = open_source(path, tmp_path / "index")
    assert opened.row(99).prompt == "p99"
    assert str(file) in caplog.text
    caplog.clear()
    assert open_source(path, tmp_path / "index").row(99).prompt == "p99"
    assert caplog.text == ""


def test_a_million_rows_take_eight_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"1\n" * 1_000_000)
    keep_index(path, tmp_path / "index")
    start = time.process_time()
    opened = JsonlFile(path, IndexFiles(tmp_path / "index"))
    assert opened.index.offsets.nbytes + opened.index.lines.nbytes < 8_000_100
    assert np.array_equal(opened.index.offsets, np.arange(0, 2_000_001, 2))
    assert time.process_time() - start < 2
