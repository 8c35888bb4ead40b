"""The intervals beside planned times: what nine of ten published runs are within (``benchmarks/plan_fit.py``).

Steps and updates were published alone, and their errors are those of the plan. Rollouts and the time in which both
sides stop were not, with all that decides them: their factor is as large as if the whole error of each step were that
part's. Log-probs were not either; they are made of the terms of an update, and get its factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import StepTime, step_time

SPREADS = {"step": 1.16, "update": 1.15, "rollout": 1.27, "logprobs": 1.15, "common": 3.0}
"""Part of a step → the factor above and below the planned seconds. ``common``: everything in which both sides stop."""
SHARE = 0.9
_LARGEST = 3.0
"""Factor of a part that cannot explain an error on its own."""


def interval(seconds: float, part: str) -> tuple[float, float]:
    """Return the bounds of a planned time."""
    factor = SPREADS[part]
    return seconds / factor, seconds * factor


def quantile(errors: Sequence[float]) -> float:
    """Return the factor that ``SHARE`` of the errors, given as logarithms, are within."""
    sizes = sorted(abs(error) for error in errors)
    return math.exp(sizes[min(len(sizes) - 1, math.ceil(SHARE * len(sizes)) - 1)])


def part_spreads(steps: Sequence[tuple[Setting, float]]) -> dict[str, float]:
    """Return the factors of ``rollout`` and ``common``, given settings and the measured seconds of their steps."""
    found: dict[str, list[float]] = {"rollout": [], "common": []}
    for setting, measured in steps:
        time = step_time(setting)
        for part, errors in found.items():
            errors.append(_error_of(time, part, measured))
    return {part: quantile(errors) for part, errors in found.items()}


def _error_of(time: StepTime, part: str, measured: float) -> float:
    """Return ln(planned / right) of a part if it alone were wrong; 0 where it is hidden behind another."""
    planned = getattr(time, part)
    if part == "rollout" and time.is_async and time.rollout < time.trainer:
        return 0.0
    right = planned + measured - time.total
    return math.log(min(max(planned / right, 1 / _LARGEST), _LARGEST)) if right > 0 else math.log(_LARGEST)
