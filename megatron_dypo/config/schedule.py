"""Weights that change with the step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from pydantic import ConfigDict

from megatron_dypo.checks import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A weight that changes with the optimizer step: it rises from 0 to ``start``, goes to ``end``, and stays there."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start: float
    """The weight after the warm-up."""
    end: float
    """The weight after ``steps`` more steps, and from then on."""
    steps: int
    """Optimizer steps from ``start`` to ``end``."""
    shape: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the change from ``start`` to ``end``; ``constant`` stays at ``start``, then jumps."""
    warmup: int = 0
    """Optimizer steps at the beginning, in which the weight rises linearly from 0."""

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require(math.isfinite(getattr(self, name)), f"{name}={getattr(self, name)}", "must be finite")
        require_positive(self, "steps")
        require_not_negative(self, "warmup")

    def at(self, step: int) -> float:
        """Return the weight of the update that follows ``step`` updates."""
        if step < self.warmup:
            return self.start * step / self.warmup
        done = (step - self.warmup) / self.steps
        if done >= 1:
            return self.end
        # The share that is left of start − end.
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.shape]
        return self.end + (self.start - self.end) * left


Weight: TypeAlias = float | Schedule
"""A weight of the objective: a number, or a number for each step."""


def weight_at(weight: Weight, step: int) -> float:
    """Return the number that ``weight`` is in the update that follows ``step`` updates."""
    return weight.at(step) if isinstance(weight, Schedule) else weight


def bounds(weight: Weight) -> tuple[float, float]:
    """Return the smallest and the largest number that ``weight`` is in any update."""
    if not isinstance(weight, Schedule):
        return weight, weight
    values = (weight.start, weight.end, *([0.0] if weight.warmup else []))
    return min(values), max(values)


def require_weight(section: object, *names: str, low: float = 0.0, high: float = math.inf) -> None:
    """Require each named weight of ``section`` to be in [low, high] in every update."""
    for name in names:
        weight = getattr(section, name)
        smallest, largest = bounds(weight)
        rule = f"must be in [{low:g}, {high:g}]" if high < math.inf else "must not be negative"
        require(math.isfinite(largest) and low <= smallest and largest <= high, f"{name}={weight}", rule)
