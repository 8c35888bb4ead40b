"""The lint of words finds old ones, and there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_words import all_findings, beginnings, findings


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


@pytest.mark.parametrize("word", ["What", "Of", "As", "The same"])
@pytest.mark.parametrize(
    "source",
    ['"""{} x."""', 'def f():\n    """{} x."""', 'class A:\n    x: int\n    """{} x."""', 'X = 1\n"""{} x."""'],
)
def test_a_docstring_that_begins_with_a_noun_clause_is_found(tmp_path: Path, source: str, word: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source.format(word), encoding="utf-8")
    (found,) = beginnings(path, "module.py")
    assert found.endswith(f"a docstring begins with {word!r}: say who does what")


def test_other_texts_and_words_that_begin_alike_are_left(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""Offer x."""\nX = "What is it?"\nf = lambda: "As it is"\n', encoding="utf-8")
    assert list(beginnings(path, "module.py")) == []


def test_nothing_is_found_in_the_tracked_files() -> None:
    assert list(all_findings()) == []
