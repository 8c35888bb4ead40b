"""The division of GPUs between trainer and servers, and the effect of more GPUs. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_dypo.planning.footprint import fullest
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import StepTime, step_time

SIZES = tuple(2**power for power in range(4, 13))
"""GPUs of the weak-scaling table: 16 to 4,096."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A division of GPUs, and its step."""

    trainer_gpus: int
    rollout_gpus: int
    time: StepTime
    fits: bool
    """Whether the trainer fits. With fewer replicas each rank holds more of the optimizer state."""


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A row of the weak-scaling table: work in proportion to the GPUs."""

    gpus: int
    split: Split | None
    """None: too few GPUs for one replica and one server."""
    efficiency: float
    """Tokens per second and GPU, divided by those of the smallest size that works."""


def splits(setting: Setting) -> list[Split]:
    """Return every division of the setting's GPUs that fits; none if trainer and servers share them.

    Trainer and servers get whole nodes; on a single node they get whole replicas and servers.
    """
    if setting.is_colocated:
        return []
    total = setting.gpus
    grain = _grain(setting)
    found = (_split(setting, trainer, total - trainer) for trainer in range(grain, total, grain))
    return [split for split in found if split is not None and split.fits]


def best_split(setting: Setting, *, overlapped: bool) -> Split:
    """Return the division with the shortest step; ``overlapped``: rollouts are sampled during the update."""
    return min(splits(setting), key=lambda split: split.time.overlapped if overlapped else split.time.sequential)


def weak_scaling(setting: Setting, sizes: tuple[int, ...] = SIZES) -> list[Scaled]:
    """Scale an update's prompts, the replicas and the servers together; keep the setting's division of GPUs."""
    share = setting.trainer_gpus / setting.gpus
    rows: list[Scaled] = []
    first = None
    for gpus in sizes:
        trainer = round(share * gpus / _grain(setting)) * _grain(setting)
        rollout = trainer if setting.is_colocated else gpus - trainer
        split = _split(_with_work(setting, gpus), trainer, rollout)
        rate = split.time.tokens / split.time.total / gpus if split else math.nan
        first = rate if first is None and split else first
        rows.append(Scaled(gpus=gpus, split=split, efficiency=rate / first if first else math.nan))
    return rows


def _grain(setting: Setting) -> int:
    """Return the divisor of every possible number of trainer GPUs."""
    is_small = setting.gpus <= setting.gpus_per_node
    fewest = setting.config.parallel.fewest_ranks
    return fewest if is_small else math.lcm(fewest, setting.gpus_per_node)


def _split(setting: Setting, trainer: int, rollout: int) -> Split | None:
    num_servers = rollout // setting.config.rollout.servers.tensor_parallel
    if trainer <= 0 or num_servers <= 0:
        return None
    changed = dataclasses.replace(setting, trainer_gpus=trainer, num_servers=num_servers)
    fits = fullest(trainer_footprints(changed)).spare >= 0
    return Split(trainer_gpus=trainer, rollout_gpus=changed.rollout_gpus, time=step_time(changed), fits=fits)


def _with_work(setting: Setting, gpus: int) -> Setting:
    factor = gpus / setting.gpus
    cfg = setting.config

    def scaled(count: int) -> int:
        return max(1, round(count * factor))

    config = dataclasses.replace(
        cfg,
        batching=dataclasses.replace(cfg.batching, prompts_per_update=scaled(cfg.batching.prompts_per_update)),
        rollout=dataclasses.replace(cfg.rollout, prompts_per_round=scaled(cfg.rollout.prompts_per_round)),
    )
    return dataclasses.replace(setting, config=config)
