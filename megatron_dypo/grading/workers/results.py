"""The values that a verifier may return, and what they mean."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

CORRECTNESS_KEYS = ("is_correct", "correct", "acc")
"""Keys of a dict that say whether the response is correct; ``acc`` is verl's."""
REWARD_KEYS = ("reward", "score")
"""Keys of a dict that hold a shaped reward; ``score`` is verl's. Without a key of correctness ``score`` is read like a
number."""

LARGEST_REWARD = 1e6
"""Advantages are differences and squares of rewards in float32."""

_ROUNDING = 1e-9
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 120
_shorten.maxdict = _shorten.maxlist = _shorten.maxtuple = 8


def shown(value: object) -> str:
    """Return a short representation of any value, however large it is."""
    return _shorten.repr(value)


def read_result(result: Any) -> tuple[bool, float]:
    """Return (is_correct, reward) for the value that a verifier returned.

    A bool is both. A number is the reward, and correct from 1 up (within 1e-9). A dict has ``is_correct`` (or
    ``correct``, ``acc``): a bool, 0 or 1; and may have ``reward`` (or ``score``), a shaped reward that leaves
    correctness alone. A dict with ``score`` alone is read like that number. A reward is at most 1e6 in size.

    Raises ValueError, or TypeError for another type, naming the value and the rule.
    """
    if isinstance(result, Mapping):
        return _read_mapping(result)
    if isinstance(result, bool | np.bool_):
        return bool(result), float(result)
    if isinstance(result, numbers.Real | Decimal):
        reward = _finite(result, result)
        return reward >= 1 - _ROUNDING, reward
    raise TypeError(
        f"the verifier returned {shown(result)} ({type(result).__name__}): must be a bool, a number or a dict"
    )


def _read_mapping(result: Mapping[Any, Any]) -> tuple[bool, float]:
    flags = {key: _flag(result, key) for key in CORRECTNESS_KEYS if key in result}
    if len(set(flags.values())) > 1:
        raise ValueError(f"the verifier returned {shown(dict(result))}: {' and '.join(flags)} contradict each other")
    rewards = {key: _finite(result[key], result, key) for key in REWARD_KEYS if key in result}
    if len(set(rewards.values())) > 1:
        raise ValueError(f"the verifier returned {shown(dict(result))}: {' and '.join(rewards)} contradict each other")
    reward = next(iter(rewards.values()), None)
    if flags:
        is_correct = next(iter(flags.values()))
        return is_correct, float(is_correct) if reward is None else reward
    if "score" in rewards:
        return rewards["score"] >= 1 - _ROUNDING, rewards["score"]
    raise ValueError(
        f"the verifier returned a dict with the keys {shown(list(result))}: it must have one of "
        f"{', '.join(CORRECTNESS_KEYS)} (true, false, 0 or 1), and may have {' or '.join(REWARD_KEYS)}; "
        "score alone is read like a number"
    )


def _flag(result: Mapping[Any, Any], key: str) -> bool:
    value = result[key]
    if isinstance(value, bool | np.bool_) or (isinstance(value, numbers.Real | Decimal) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"the verifier returned {key}={shown(value)}: {key} must be true, false, 0 or 1")


def _finite(value: Any, result: Any, name: str = "the reward") -> float:
    rule = f"the verifier returned {shown(result)}: {name} must be a number of at most {LARGEST_REWARD:g} in size"
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError(rule)
    try:
        reward = float(value)
    except (OverflowError, ValueError) as error:  # an enormous integer, a signalling NaN
        raise ValueError(rule) from error
    if not abs(reward) <= LARGEST_REWARD:  # NaN compares as false
        raise ValueError(rule)
    return reward
