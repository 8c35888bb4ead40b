"""The constants of a run, from its own ``metrics.jsonl``. Pure arithmetic but for reading the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_dypo.checks import require
from megatron_dypo.metrics.planned import measured_seconds, steady_steps
from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.planning.constants import Constants
from megatron_dypo.planning.fitting import fit_constants
from megatron_dypo.planning.setting import Assumptions, Setting
from megatron_dypo.planning.step import StepTime, step_time

NOISE = 0.02
"""Standard deviation of the logarithm of a run's mean seconds."""
_SPREADS = {
    "rollout": {"hbm": 0.2, "decode_layer_s": 0.7, "scheduler_s": 0.7, "request_s": 0.7},
    "update": {"matmul": 0.3, "expert_matmul": 0.3, "dense_layer_s": 0.7, "expert_layer_s": 0.7},
    "refit": {"refit": 1.5},
    "loop": {"loop_s": 1.5},
}
"""Part of a step → the constants that decide it, and how far each may be from the stated one (``fitting.py``).
Log-probs have those of an update."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The means that a run measured."""

    steps: int
    seconds: Mapping[str, float]
    """Part of a step → mean seconds; only parts that the plan can be compared with."""
    records: Sequence[Mapping[str, Any]]

    def mean(self, name: str) -> float | None:
        values = [record[name] for record in self.records if record.get(name) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A run's constants, and how well they explain it."""

    steps: int
    stated: Constants
    found: Constants
    changed: tuple[str, ...]
    """Names of the constants that the run's measurements can say something about."""
    parts: Mapping[str, tuple[float, float, float]]
    """Part of a step → seconds: planned with the stated constants, measured, planned with those found."""


def read_measured(path: Path) -> Measured:
    """Read a run's ``metrics.jsonl``.

    Raises:
        ValueError: there is no such file, a line is damaged, or no step has times.
    """
    require(path.is_file(), f"calibrate={path}", "no such file; give the metrics.jsonl of a run folder")
    records = steady_steps(read_metrics(path))
    require(bool(records), f"calibrate={path}", "no step in it has timing_s/step")
    found = {part: measured_seconds(records, part) for part in ("rollout", "log-probs", "update", "refit", "loop")}
    seconds = {part: value for part, value in found.items() if value}
    return Measured(steps=len(records), seconds=seconds, records=records)


def assumed_from(measured: Measured, given: Assumptions) -> Assumptions:
    """Return the run's mean lengths and tiers; those of ``given`` that it did not measure."""
    lengths = {
        "prompt_tokens": measured.mean("rollout/prompt_len/mean"),
        "response_tokens": measured.mean("rollout/response_len/mean"),
    }
    tiers = {"easy": measured.mean("gate/easy"), "hard": measured.mean("gate/hard")}
    changes: dict[str, Any] = {name: max(1, round(value)) for name, value in lengths.items() if value is not None}
    if None not in tiers.values():
        changes |= tiers
    return replace(given, **changes)


def calibrate(setting: Setting, measured: Measured) -> Calibration:
    """Return the constants, nearest to the setting's, that explain the run's seconds.

    An asynchronous run samples beside its update, so that its rollouts say nothing.
    """
    seconds = dict(measured.seconds)
    if setting.config.rollout.mode == "async":
        seconds.pop("rollout", None)
    spreads: dict[str, float] = {}
    for part in seconds:
        spreads |= _SPREADS["update" if part == "log-probs" else part]
    unused = ("dense_layer_s",) if setting.arch.experts else ("expert_matmul", "expert_layer_s")
    spreads = {name: spread for name, spread in spreads.items() if name not in unused}

    def planned(constants: Constants) -> dict[str, float]:
        return _parts(step_time(replace(setting, constants=constants)))

    def errors(constants: Constants) -> list[float]:
        times = planned(constants)
        return [math.log(times[part] / value) / NOISE if times[part] else 0.0 for part, value in seconds.items()]

    found = fit_constants(errors, setting.constants, spreads)
    before, after = planned(setting.constants), planned(found)
    return Calibration(
        steps=measured.steps,
        stated=setting.constants,
        found=found,
        changed=tuple(spreads),
        parts={part: (before[part], value, after[part]) for part, value in seconds.items()},
    )


def calibrated(setting: Setting, path: Path, *, keep_lengths: bool) -> tuple[Setting, Calibration]:
    """Return the setting with a run's lengths, tiers and constants.

    Args:
        keep_lengths: whether to keep the setting's lengths, which the user gave.

    Raises:
        ValueError: as :func:`read_measured`.
    """
    measured = read_measured(path)
    if not keep_lengths:
        setting = replace(setting, assumed=assumed_from(measured, setting.assumed))
    calibration = calibrate(setting, measured)
    return replace(setting, constants=calibration.found), calibration


def as_dict(calibration: Calibration) -> dict[str, Any]:
    """Return the calibration as plain data."""
    names = ("planned_s", "measured_s", "calibrated_s")
    return {
        "calibration": {
            "steps": calibration.steps,
            "constants": {name: getattr(calibration.found, name) for name in calibration.changed},
            "parts": {part: dict(zip(names, times, strict=True)) for part, times in calibration.parts.items()},
        }
    }


def render_calibration(calibration: Calibration) -> str:
    """Return the report's part on the run's constants, as text that ends with a newline."""
    lines = [f"CALIBRATION by {calibration.steps} steps of the run; lengths and tiers are the run's too"]
    lines.append(f"  {'part of a step':<22}{'planned s':>11}{'measured s':>12}{'with its constants':>20}")
    for part, (before, value, after) in calibration.parts.items():
        lines.append(f"  {part:<22}{before:>11.1f}{value:>12.1f}{after:>20.1f}")
    lines.append(f"  {'constant':<22}{'stated':>11}{'the run':>12}")
    for name in calibration.changed:
        lines.append(f"  {name:<22}{getattr(calibration.stated, name):>11.3g}{getattr(calibration.found, name):>12.3g}")
    return "\n".join(lines) + "\n"


def _parts(time: StepTime) -> dict[str, float]:
    return {
        "rollout": time.rollout,
        "log-probs": time.logprobs,
        "update": time.update.total,
        "refit": time.refit + time.switch,
        "loop": time.loop,
    }
