"""Rules that configuration values must keep; a broken one is a ValueError that names value and rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

MAX_INTEGER = 2**53
"""Larger integers are no longer exact in a float, a JSON number or a metric."""


def require(condition: bool, value: str, rule: str) -> None:
    """Raise ``ValueError("<value>: <rule>")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{value}: {rule}")


def require_positive(section: object, *names: str) -> None:
    """Require each named field of ``section`` to be above zero."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{name}={value}", "must be positive")


def require_not_negative(section: object, *names: str) -> None:
    """Require each named field of ``section`` to be zero or above."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{name}={value}", "must not be negative")


def require_divides(axis: str, size: int, name: str, value: int, *, hint: str = "") -> None:
    """Raise ``ValueError("<axis>=<size> does not divide <name>=<value><hint>")`` unless ``size`` divides ``value``.

    This is the rule of everything that ranks share evenly: heads, features, layers, experts.
    """
    if size < 1 or value % size:
        raise ValueError(f"{axis}={size} does not divide {name}={value}{hint}")


def require_sound_values(section: object, path: str = "") -> None:
    """Require every number in a tree of dataclasses to be finite and every text to be free of NUL.

    Raises:
        ValueError: names the dotted key, the value and the rule.
    """
    for key, value in _leaves(section, path):
        if isinstance(value, float):
            require(math.isfinite(value), f"{key}={value}", "must be a finite number")
        elif isinstance(value, int):
            require(abs(value) < MAX_INTEGER, f"{key}={value:.3e}", "must be below 2^53")
        elif isinstance(value, str):
            require("\0" not in value, f"{key}={value!r}", "must not contain NUL")


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        children = {str(key): item for key, item in value.items()}
        yield from ((path, key) for key in children)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, path)
        return
    else:
        yield path, value
        return
    for name, child in children.items():
        yield from _leaves(child, f"{path}.{name}" if path else name)
