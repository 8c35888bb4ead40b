"""What a verifier may return."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.grading.workers.results import read_result, shown


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (True, (True, 1.0)),
        (np.bool_(False), (False, 0.0)),
        (1, (True, 1.0)),
        (0.999, (False, 0.999)),
        (-1, (False, -1.0)),
        (Fraction(3, 2), (True, 1.5)),
        (Decimal("0.5"), (False, 0.5)),
        ({"is_correct": Decimal(1), "reward": Decimal("0.25")}, (True, 0.25)),
        (np.float32(1.0), (True, 1.0)),
        ({"is_correct": True}, (True, 1.0)),
        ({"is_correct": 1}, (True, 1.0)),
        ({"is_correct": np.int64(0), "reward": 5}, (False, 5.0)),
        ({"correct": False, "why": "units"}, (False, 0.0)),
        ({"score": -1.0, "acc": False, "pred": "7"}, (False, -1.0)),
        ({"score": 1.0, "acc": 1.0}, (True, 1.0)),
        ({"score": 0.5}, (False, 0.5)),
        ({"score": 1.0}, (True, 1.0)),
        ({"is_correct": True, "acc": 1, "reward": 0.25}, (True, 0.25)),
        ({"is_correct": False, "reward": 2.0}, (False, 2.0)),
    ],
)
def test_a_result_is_correctness_and_a_reward(result: Any, expected: tuple[bool, float]) -> None:
    assert read_result(result) == expected


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"returned None \(NoneType\): must be a bool, a number or a dict"),
        ("yes", r"returned 'yes' \(str\): must be"),
        ((True, "why"), r"returned \(True, 'why'\) \(tuple\): must be"),
        ([True], r"\(list\): must be"),
        (1j, r"\(complex\): must be"),
        (np.array([1.0]), r"\(ndarray\): must be"),
        (float("nan"), "returned nan: the reward must be a number of at most 1e\\+06 in size"),
        (-math.inf, "returned -inf: the reward must be a number of at most 1e\\+06 in size"),
        (Decimal("sNaN"), "must be a number of at most"),
        (Decimal("NaN"), "must be a number of at most"),
        (1.1e6, "returned 1100000.0: the reward must be a number of at most"),
        (10**400, "must be a number of at most 1e\\+06 in size"),
        ({}, r"the keys \[\]: it must have one of is_correct, correct, acc"),
        ({"reward": 1.0, "ok": True}, r"the keys \['reward', 'ok'\]: it must have one of is_correct, correct, acc"),
        ({"is_correct": 0.7}, "is_correct=0.7: is_correct must be true, false, 0 or 1"),
        ({"is_correct": "true"}, "is_correct='true'"),
        ({"acc": None}, "acc=None"),
        ({"is_correct": float("nan")}, "is_correct=nan"),
        ({"is_correct": True, "acc": False}, "is_correct and acc contradict each other"),
        ({"is_correct": True, "reward": 1.0, "score": 0.0}, "reward and score contradict each other"),
        ({"is_correct": True, "reward": float("inf")}, "inf}: reward must be a number of at most 1e\\+06 in size"),
        ({"acc": True, "score": "1"}, "score must be a number of at most 1e\\+06 in size"),
        ({"is_correct": True, "reward": None}, "must be a number of at most 1e\\+06 in size"),
    ],
)
def test_anything_else_is_an_error_that_names_value_and_rule(result: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        read_result(result)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400)
_KEYS = st.sampled_from(["is_correct", "correct", "acc", "reward", "score", "other"])


@settings(deadline=None, max_examples=300)
@given(_SCALARS | st.lists(_SCALARS, max_size=2) | st.dictionaries(_KEYS, _SCALARS, max_size=4))
def test_a_result_is_read_whole_or_refused(result: Any) -> None:
    try:
        is_correct, reward = read_result(result)
    except (TypeError, ValueError):
        return
    assert type(is_correct) is bool
    assert type(reward) is float
    assert abs(reward) <= 1e6
    flags = (
        [result[key] for key in ("is_correct", "correct", "acc") if key in result] if isinstance(result, dict) else []
    )
    assert all(flag == is_correct for flag in flags)


def test_a_large_value_has_a_short_representation() -> None:
    assert len(shown("x" * 10**7)) < 200
    assert len(shown({str(i): "y" * 10**4 for i in range(10**4)})) < 2000
