"""The fields of a JSON object, each checked as it is read: errors name file, field, value and rule."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_dypo.models.hf.json_file import shown

MAX_INTEGER = 2**31 - 1
"""Largest size in a model, since kernels of Megatron and SGLang use 32-bit indices."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The values of one object of a JSON file."""

    values: Mapping[str, Any]
    where: str
    """Name of the file, for errors."""
    section: str = ""
    """Name of the object in the file, followed by a point; empty: the top-level object."""

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        """Return the value of a field, unchecked; None if it is missing."""
        return self.values.get(name)

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise the ValueError that names this field, its value and the rule that it breaks."""
        value = f"={shown(self.values[name])}" if name in self.values else " is missing"
        raise ValueError(f"{self.where}: {self.section}{name}{value}: {rule}")

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a size. A missing field gets ``default`` (None: the field is required); null does not."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_INTEGER:
            small = "" if not isinstance(value, int) or value <= MAX_INTEGER else f" up to {MAX_INTEGER}"
            self.refuse(name, f"must be a positive integer{small}")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """Return a size, or None for null. A missing field gets ``default``."""
        return None if self.values.get(name, default) is None else self.integer(name, default)

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> float:
        """Return a finite number within the given bounds. ``default`` is as in :meth:`integer`."""
        value = self.values.get(name, default)
        number = _as_float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        bounds = {
            "above": (above, above is None or number > above),
            "of at least": (least, least is None or number >= least),
            "of at most": (most, most is None or number <= most),
        }
        if not math.isfinite(number) or not all(holds for _, holds in bounds.values()):
            said = [f"{words} {bound:g}" for words, (bound, _) in bounds.items() if bound is not None]
            self.refuse(name, f"must be a finite number {' and '.join(said)}".rstrip())
        return number

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false. A missing field gets ``default``; null does not."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def object(self, name: str) -> Fields | None:
        """Return the fields of an object inside this one; None if it is missing, null or empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(name, "must be an object")
        return Fields(values=value, where=self.where, section=f"{self.section}{name}.") if value else None

    def refuse_others(self, known: Collection[str], rule: str) -> None:
        """Raise ValueError for a field that is not in ``known``, unless its value is null."""
        for name, value in self.values.items():
            if name not in known and value is not None:
                self.refuse(name, rule)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf
