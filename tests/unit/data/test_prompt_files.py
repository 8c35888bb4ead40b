"""A file that cannot be used is named at opening, for every kind of damage."""

from __future__ import annotations

import gzip
import json
import os
import random
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.source import distinct_names

GOOD = {"prompt": "p", "answer": "a"}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(path: Path, rows: list, **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.jsonl", LFS, "is a git-lfs pointer: run `git lfs pull`"),
        ("x.parquet", LFS, "is a git-lfs pointer: run `git lfs pull`"),
        ("x.jsonl", b"", "is empty"),
        ("x.parquet", b"", "is empty"),
        ("x.jsonl", b"\n \n", "has no rows"),
        ("x.jsonl", gzip.compress(_lines(GOOD), mtime=0), "is compressed by gzip: unpack it first"),
        ("x.jsonl", json.dumps(GOOD).encode("utf-16"), "is text in UTF-16: must be UTF-8"),
        ("x.jsonl", b"PAR1" + bytes(20), "is a Parquet file: its name must end in .parquet"),
        ("x.parquet", _lines(GOOD), "is not a Parquet file: "),
        ("x.parquet", b"PAR1" + bytes(20), "is not a Parquet file: "),
    ],
)
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        PromptDataset([path])
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.parquet").mkdir()
    for name, problem in (
        ("loop.jsonl", "no such file"),
        ("folder.parquet", "is a folder: name its files"),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
        ("a\0b.jsonl", "no such file"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            PromptDataset([tmp_path / name])
        assert name in str(caught.value)


def test_a_last_line_that_was_cut_off_says_so(tmp_path: Path) -> None:
    whole = _lines(GOOD, {**GOOD, "id": "second"})
    path = _write(tmp_path / "x.jsonl", whole[:-12])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: is not JSON: .*; the file ends here, without a line break"):
        PromptDataset([path])
    # Only the line break is missing: the row is whole.
    assert len(PromptDataset([_write(tmp_path / "y.jsonl", whole[:-1])])) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + _lines(GOOD, GOOD))
    assert [row.prompt for row in PromptDataset([path])] == ["p", "p"]


def _said_of(path: Path) -> str:
    try:
        dataset = PromptDataset([path])
    except ValueError as error:
        text = str(error)
    else:
        assert len(dataset) == 60
        return "nothing"
    assert str(path) in text
    return "row group" if "row group" in text else "file"


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_a_flipped_byte_names_file_and_row_group_or_changes_a_text(tmp_path: Path, compression: str) -> None:
    rows = [{"prompt": f"What is {i} times {i * 7919 % 97}?", "answer": str(i), "id": f"u{i}"} for i in range(60)]
    clean = _parquet(tmp_path / "x.parquet", rows, row_group_size=20, compression=compression).read_bytes()
    draw = random.Random(0)
    said = set()
    for _ in range(150):
        damaged = bytearray(clean)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path = _write(tmp_path / "x.parquet", bytes(damaged))
        said.add(_said_of(path))
    assert {"row group", "file"} <= said


def test_the_checksums_of_pages_are_verified(tmp_path: Path) -> None:
    rows = [{"prompt": f"a text that is stored as it is {i}", "answer": "1"} for i in range(40)]
    path = _parquet(tmp_path / "x.parquet", rows, row_group_size=20, compression="none", write_page_checksum=True)
    content = path.read_bytes()
    at = content.index(b"stored as it is 30")
    _write(path, content[:at] + b"S" + content[at + 1 :])
    with pytest.raises(
        ValueError, match=r"x\.parquet: row group 1 \(rows 21 to 40\) cannot be read, the file is damaged"
    ):
        PromptDataset([path])
    # Skipping bad rows does not hide it: a damaged file is not a bad row.
    with pytest.raises(ValueError, match="row group 1"):
        PromptDataset([path], data=DataConfig(on_bad_row="skip"))


def test_row_groups_that_are_larger_than_what_is_kept_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dypo.data.parquet_files.CACHED_BYTES", 0)
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(12)]
    dataset = PromptDataset([_parquet(tmp_path / "x.parquet", rows, row_group_size=4)])
    for index in (0, 11, 5, 1, 10, 4, 0):
        assert dataset[index].answer == str(index)


def test_a_text_in_parquet_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    prompts = pyarrow.array([b"good", b"ba\xffd", b"good"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": prompts, "answer": ["1", "2", "3"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="1 bad row") as caught:
        PromptDataset([tmp_path / "x.parquet"])
    assert str(caught.value).splitlines()[1].endswith("x.parquet:2: byte 2 of a text is not UTF-8")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [_write(tmp_path / folder / "test.jsonl", _lines(GOOD)) for folder in ("aime", "math")]
    rows = list(PromptDataset(paths))
    assert [row.prompt_id for row in rows] == ["aime/test.jsonl:1", "math/test.jsonl:1"]
    assert [row.source for row in rows] == ["aime/test", "math/test"]


def test_a_file_under_two_names_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", _lines(GOOD))
    (tmp_path / "y.jsonl").symlink_to(path)
    with pytest.raises(ValueError, match=r"y\.jsonl: is the same file as .*x\.jsonl: name each once"):
        PromptDataset([path, tmp_path / "y.jsonl"])


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "answer", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: has the column prompt twice"):
        PromptDataset([tmp_path / "x.parquet"])


def test_a_decimal_is_a_number(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "answer": [Decimal("1.50")]}), tmp_path / "x.parquet")
    assert PromptDataset([tmp_path / "x.parquet"])[0].answer == "1.50"


def test_the_fewest_parts_of_a_path_name_a_file() -> None:
    paths = [Path(path) for path in ("/a/b/x.jsonl", "/c/b/x.jsonl", "/c/y.jsonl")]
    assert distinct_names(paths) == ["a/b/x.jsonl", "c/b/x.jsonl", "y.jsonl"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_file_that_changes_after_opening_ends_reading(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(*rows: dict) -> None:
        if path.suffix == ".jsonl":
            _write(path, _lines(*rows))
        else:
            _parquet(path, list(rows))

    write(GOOD, {**GOOD, "prompt": "q"})
    dataset = PromptDataset([path])
    os.utime(path, (1, 1))
    assert dataset[1].prompt == "q", "another time alone is no change"
    write(GOOD, {**GOOD, "prompt": "r"})
    with pytest.raises(ValueError, match=rf"{name}:2: the file has changed since it was opened"):
        dataset[1]
    assert [row.prompt for row in PromptDataset([path])] == ["p", "r"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_file_that_is_replaced_by_another_stays_what_it_was(tmp_path: Path, name: str) -> None:
    path, other = tmp_path / name, tmp_path / f"other-{name}"
    for file, prompt in ((path, "p"), (other, "q")):
        rows = [{**GOOD, "prompt": prompt}] * 2
        _write(file, _lines(*rows)) if file.suffix == ".jsonl" else _parquet(file, rows)
    dataset = PromptDataset([path])
    other.replace(path)
    assert dataset[1].prompt == "p"
    path.unlink()
    assert dataset[0].prompt == "p"
