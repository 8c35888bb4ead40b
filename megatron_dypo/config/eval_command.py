"""The configuration of ``megatron-dypo eval``: those sections of a run's config that an evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_sound_values
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.rollout import RolloutConfig

_MAX_SEED = 2**31


@dataclass(frozen=True, kw_only=True)
class EvalCommandConfig:
    """The file of ``megatron-dypo eval --sets``. Its sections are those of a run's config, with the same keys."""

    seed: int = 1
    """Seed of the responses and of the order of options."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the servers that the command starts."""
    shared_files: bool = False
    """Give the files that the command writes the modes that the umask says. ``false``: only this user can read them."""
    data: DataConfig = field(default_factory=DataConfig)
    """Columns, chat template and limits of the sets. Leave ``prompts`` empty: ``eval.sets`` names the files."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Servers, response length, top_p and top_k, requests in flight, retries. The section ``eval`` gives the
    temperature."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require_sound_values(self)
        require(0 <= self.seed < _MAX_SEED, f"seed={self.seed}", "must be in [0, 2^31)")
        require(bool(self.eval.sets), "eval.sets={}", "name at least one set, as in {math500: {path: math500.jsonl}}")
        require(
            not self.data.prompts, f"data.prompts={list(self.data.prompts)}", "does nothing here: sets are in eval.sets"
        )
