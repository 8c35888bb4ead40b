"""Unwrap a value that may be None by its type, but never is in the test."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return ``value``; fail if it is None."""
    assert value is not None
    return value
