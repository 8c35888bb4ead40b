"""Counts of rows and traces that draws and checks left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.data.row_check.check import check_part
from megatron_dypo.data.rows import BadRow


def test_counts_of_draws_add_up_and_positions_come_in_order() -> None:
    one, other = (
        DropCounts(too_long=(5, 9), traces=2, wrong_traces=3),
        DropCounts(too_long=(7,), traces=20, wrong_traces=30),
    )
    total = one + other
    assert total == other + one == DropCounts(too_long=(5, 7, 9), traces=22, wrong_traces=33)
    assert total.prompts == 3


def test_each_row_of_a_part_is_told_once_bad_ones_too() -> None:
    part: Any = SimpleNamespace(lines=[4, 8], scan=lambda: iter([BadRow("a=1: no"), BadRow("b=2: no", "c=3: no")]))
    unused: Any = None
    told: list[int] = []
    found = check_part(part, unused, None, DataConfig(prompts=("none",)), told.append)
    assert told == [1, 1]
    assert found.problems == {0: ("a=1: no",), 1: ("b=2: no", "c=3: no")}
