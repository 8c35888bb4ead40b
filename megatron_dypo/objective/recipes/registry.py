"""Objectives by name. A new one is a file beside this and a row here."""

from __future__ import annotations

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.dypo import Dypo
from megatron_dypo.objective.recipes.grpo import Grpo
from megatron_dypo.objective.recipes.sft import Sft
from megatron_dypo.objective.recipes.sft_then_rl import SftThenRl

OBJECTIVES: dict[str, type[Objective]] = {"dypo": Dypo, "grpo": Grpo, "sft": Sft, "sft_then_rl": SftThenRl}


def build_objective(cfg: ObjectiveConfig) -> Objective:
    """The objective that ``cfg.name`` names.

    Raises:
        ValueError: no such objective, or options that it cannot work with.
    """
    if cfg.name not in OBJECTIVES:
        raise ValueError(f"objective.name={cfg.name!r}: must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[cfg.name](cfg)
