"""Refuse a run that cannot fit, before it loads a model."""

from __future__ import annotations

import dataclasses

from megatron_dypo.config.tree import Config
from megatron_dypo.models.bridged import tabled_architecture
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.footprint import fullest
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.plan import misfit
from megatron_dypo.planning.setting import Assumptions, Setting


def check_memory(config: Config, *, trainer_gpus: int, memory: int, capability: tuple[int, int], fused: bool) -> None:
    """Check that the trainer's ranks fit into GPUs of ``memory`` bytes, ignoring fragmentation.

    Args:
        capability: compute capability of the GPUs; the number of FP8 copies depends on it.
        fused: whether Transformer Engine is in use.

    Raises:
        ValueError: a rank does not fit; the message names the largest term and how to reduce it.
    """
    setting = Setting(
        config=config,
        arch=tabled_architecture(config.model, "run.check_memory"),
        # Only memory and capability matter here, not speed.
        gpu=dataclasses.replace(find_gpu("h100-80gb"), name="this GPU", memory=memory, capability=capability),
        gpus_per_node=trainer_gpus,
        trainer_gpus=trainer_gpus,
        num_servers=1,
        assumed=Assumptions(
            prompt_tokens=config.data.max_prompt_tokens, response_tokens=config.rollout.max_new_tokens // 4
        ),
        fused=fused,
    )
    tightest = fullest(trainer_footprints(setting))
    needed = tuple(term for term in tightest.terms if term.name != "fragmentation")
    tightest = dataclasses.replace(tightest, terms=needed)
    if tightest.spare < 0:
        raise ValueError(f"{misfit(tightest)}; run.check_memory=false starts the run anyway")
