"""The lint of words finds old ones, and there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_words import ROOT, findings, tracked_files


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("def push(run): ...", "push"),
        ("the engine answers", "engine"),
        ("weights.transport: auto", "weights.transport"),
        ("It waits for ever.", "for ever"),
        ("row_multiple = 8", "row_multiple"),
    ],
)
def test_an_old_word_is_found_with_its_place_and_the_word_to_use(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"first\n{line}\n", encoding="utf-8")
    (found,) = findings(path, "page.md")
    assert found.startswith(f"page.md:2: {word!r}: say ")


@pytest.mark.parametrize(
    "line", ["Transformer Engine", "import transformer_engine", "heappush(a, b)", "in so many words"]
)
def test_a_word_that_only_looks_alike_is_left(tmp_path: Path, line: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(line, encoding="utf-8")
    assert list(findings(path, "page.md")) == []


def test_no_tracked_file_has_an_old_word() -> None:
    assert [line for name in tracked_files() for line in findings(ROOT / name, name)] == []
