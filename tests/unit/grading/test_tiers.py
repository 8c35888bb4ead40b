"""The gate: the tier of a group of verdicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.grading.tiers import grade_tier
from megatron_dypo.types import Tier


@given(st.lists(st.booleans(), min_size=1, max_size=16))
def test_all_is_easy_none_is_hard_else_mid(flags: list[bool]) -> None:
    expected = Tier.EASY if all(flags) else Tier.MID if any(flags) else Tier.HARD
    assert grade_tier(flags) is expected
    assert grade_tier(np.array(flags)) is expected
    as_numbers: Any = [int(flag) for flag in flags]
    assert grade_tier(as_numbers) is expected
    assert grade_tier(flags[::-1]) is expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[True], [False]], r"shape \(2, 1\)"),
        ([0.5, 1.0], "not rewards"),
        ([float("nan")], "not rewards"),
    ],
)
def test_what_is_no_group_of_flags_is_refused(flags: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade_tier(flags)
