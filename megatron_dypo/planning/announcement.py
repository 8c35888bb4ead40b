"""Write the plan of a run's step beside its metrics, so that a report can show planned beside measured."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.metrics.planned import PlannedPart, PlannedStep, write_planned
from megatron_dypo.planning.devices import find_rates
from megatron_dypo.planning.intervals import interval
from megatron_dypo.planning.setting import Setting, make_setting
from megatron_dypo.planning.step import step_time

log = logging.getLogger("megatron_dypo")


def announce_plan(config: Config, *, device: str, trainer_gpus: int, gpus_per_node: int) -> None:
    """Write ``<run.dir>/planned.json``, if the device has a row in ``devices.py``.

    A run is never ended by its plan: what cannot be planned is logged.

    Args:
        device: name that the driver gives.
    """
    gpu = find_rates(device)
    if gpu is None:
        return
    try:
        setting = make_setting(config, gpu, gpus_per_node=gpus_per_node)
        planned = planned_step(dataclasses.replace(setting, trainer_gpus=trainer_gpus))
    except ValueError as error:
        log.warning("no plan of this run for its report: %s", error)
        return
    write_planned(Path(config.run.dir), planned)


def planned_step(setting: Setting) -> PlannedStep:
    """Return the seconds of the parts of a step with their intervals."""
    time = step_time(setting)
    parts = {
        "rollout": (time.rollout, "rollout"),
        "log-probs": (time.logprobs, "logprobs"),
        "update": (time.update.total, "update"),
        "refit": (time.refit + time.switch, "common"),
        "loop": (time.loop, "common"),
        "step": (time.total, "step"),
    }
    shown = {}
    for name, (seconds, spread) in parts.items():
        low, high = interval(seconds, spread)
        shown[name] = PlannedPart(seconds=seconds, low=low, high=high)
    assumed = setting.assumed
    return PlannedStep(prompt_tokens=assumed.prompt_tokens, response_tokens=assumed.response_tokens, parts=shown)
