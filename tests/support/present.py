"""A value that may be None, where a test knows that it is there."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return ``value``; fail where it is None."""
    assert value is not None
    return value
