"""The versions of Python and of other packages with which this package works; ``docs/versions.md`` says what was run.

``setup.cfg`` states the same ranges for pip, and a test compares the two. Nothing is imported here but the standard
library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """Versions from ``oldest`` on, below ``below`` if there is a known end."""

    oldest: str
    below: str | None = None

    def __contains__(self, version: str) -> bool:
        return is_at_least(version, self.oldest) and not self.ends_before(version)

    def ends_before(self, version: str) -> bool:
        """Return whether ``version`` is newer than all of the range."""
        return self.below is not None and is_at_least(version, self.below)

    def __str__(self) -> str:
        return f">={self.oldest}" + (f",<{self.below}" if self.below else "")


RANGES: Mapping[str, Range] = {
    "python": Range(oldest="3.10", below="3.14"),
    "torch": Range(oldest="2.8"),
    "megatron-core": Range(oldest="0.16", below="0.20"),
    "transformer-engine": Range(oldest="2.9", below="3"),
    "sglang": Range(oldest="0.5.12", below="0.5.24"),
    "sglang-router": Range(oldest="0.3.2"),
    "transformers": Range(oldest="4.45"),
}
"""Package, by its name for pip → the versions that work."""

CPU_CORES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""Releases of Megatron-Core for which the patches for CPUs (``mcore/compat``) are tested, oldest first."""

WEIGHT_SESSIONS = "0.5.22"
"""The first SGLang with ``/begin_weight_update`` and ``/end_weight_update``. Before it a server takes updates at any
time, and names one version of the weights for a whole response."""


def newest_core(python: str) -> str:
    """Return the newest tested Megatron-Core for a version of Python: 0.17 and later have wheels from 3.12 on."""
    return CPU_CORES[-1] if is_at_least(python, "3.12") else CPU_CORES[0]


def is_at_least(version: str, oldest: str) -> bool:
    """Return whether ``version`` is ``oldest`` or later, by the numbers before any suffix.

    ``2.15.0a0+git1``, an early build of 2.15, counts as 2.15.
    """
    ours, theirs = numbers(version), numbers(oldest)
    length = max(len(ours), len(theirs))
    return _padded(ours, length) >= _padded(theirs, length)


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of ``2.13.0+cpu``, (0, 5, 12) of ``0.5.12.post1``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _padded(found: Sequence[int], length: int) -> tuple[int, ...]:
    return (*found, *[0] * (length - len(found)))
