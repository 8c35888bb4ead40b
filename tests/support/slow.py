"""Parametrized tests of which only some cases are in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(in_every_run: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Return the cases for ``parametrize``, those that ``in_every_run`` is not true of marked slow.

    A case is one value, or a tuple of one value for each argument.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if in_every_run(case) else pytest.mark.slow
        )
        for case in cases
    ]
