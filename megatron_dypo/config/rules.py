"""Rules that configuration values must keep; a broken one is a ValueError that names value and rule."""

from __future__ import annotations


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
