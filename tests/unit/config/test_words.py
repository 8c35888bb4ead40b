"""Functions for the words of messages."""

import pytest

from megatron_dypo.config.words import counted


@pytest.mark.parametrize(("count", "words"), [(0, "0 bad rows"), (1, "1 bad row"), (2, "2 bad rows")])
def test_one_is_singular_and_all_else_is_plural(count: int, words: str) -> None:
    assert counted(count, "bad row") == words


def test_an_irregular_plural_is_given() -> None:
    assert [counted(n, "batch", "batches") for n in (1, 3)] == ["1 batch", "3 batches"]
