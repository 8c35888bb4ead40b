"""The ends of prompt files, by windows of any size over files of any shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.check.ends import look_at_ends
from megatron_dypo.config.data import DataConfig

DATA = DataConfig()
LINES = st.lists(
    st.one_of(
        st.integers(1, 60).map(lambda size: json.dumps({"prompt": "p" * size, "answer": "1"})),
        st.sampled_from(["", " ", "\r"]),
    ),
    min_size=1,
    max_size=12,
)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.jsonl"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ends")


@given(lines=LINES, end=st.sampled_from(["", "\n", "\n\n"]), window=st.integers(1, 700))
@settings(deadline=None, max_examples=150)
def test_sound_rows_are_looked_at_once_at_most_and_never_refused(
    folder: Path, lines: list[str], end: str, window: int
) -> None:
    content = ("\n".join(lines) + end).encode()
    if not content:
        return
    num_rows = sum(bool(line.strip()) for line in lines)
    ends = look_at_ends(written(folder, content), "x", DATA, None, end_bytes=window)
    assert ends.problems == {}
    assert ends.num_rows <= num_rows
    if window >= len(content):
        assert ends.num_rows == num_rows


@given(lines=LINES, cut=st.integers(1, 15), window=st.integers(1, 700))
@settings(deadline=None, max_examples=150)
def test_a_row_that_was_cut_off_is_refused_at_the_files_end_whatever_the_window(
    folder: Path, lines: list[str], cut: int, window: int
) -> None:
    whole = json.dumps({"prompt": "the last", "answer": "1"})
    content = ("\n".join([*lines, whole])[:-cut]).encode()
    ends = look_at_ends(written(folder, content), "x", DATA, None, end_bytes=window)
    (problems,) = ends.problems.values()
    assert "the file ends here, without a line break" in problems[0]


@given(lines=LINES, window=st.integers(1, 700))
@settings(deadline=None, max_examples=100)
def test_a_bad_row_in_the_first_window_is_named_by_its_line(folder: Path, lines: list[str], window: int) -> None:
    bad = json.dumps({"prompt": "p"})
    content = ("\n".join([bad, *lines]) + "\n").encode()
    path = written(folder, content)
    ends = look_at_ends(path, "x", DATA, None, end_bytes=len(bad) + 1 + window)
    assert list(ends.problems) == [f"{path}:1"]
