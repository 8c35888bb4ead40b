"""The mapping ``objective.options`` read into an objective's own dataclass."""

from __future__ import annotations

from typing import TypeVar

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.typed import read_typed

T = TypeVar("T")


def read_options(kind: type[T], cfg: ObjectiveConfig) -> T:
    """Return ``cfg.options`` as a ``kind``, a dataclass.

    Raises:
        ValueError: one line for each problem: an unknown option, with the nearest known one; a value that breaks a
        rule.
    """
    options, problems = read_typed(kind, cfg.options)
    if options is None:
        raise ValueError("\n".join(f"objective.options.{problem} ({cfg.name})" for problem in problems))
    return options
