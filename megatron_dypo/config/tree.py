"""The configuration tree: one frozen dataclass for each section, with every default and every cross-check.

A broken rule is a ValueError that names key, value and rule. The docstring of a field is its documentation:
:mod:`megatron_dypo.config.reference` makes the manual of them. :mod:`megatron_dypo.config.reading.load` reads YAML and
overrides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_dypo.checks import require, require_sound_values
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.objective import ObjectiveConfig, OldLogpConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.config.profile import ProfileConfig
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig, ServersConfig
from megatron_dypo.config.run import CheckpointConfig, ExportConfig, LoggingConfig, RunConfig
from megatron_dypo.config.server_flags import ROUTES_FLAG, require_refittable
from megatron_dypo.config.training import BatchingConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole config of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher_servers: TeacherServersConfig = field(default_factory=TeacherServersConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    old_logp: OldLogpConfig = field(default_factory=OldLogpConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require_sound_values(self)
        require(bool(self.data.prompts), "data.prompts=()", "name at least one JSONL or Parquet file")
        require(
            max(self.profile.steps, default=0) <= self.run.steps,
            f"profile.steps={list(self.profile.steps)}",
            f"must not exceed run.steps={self.run.steps}",
        )
        for name, value in (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("objective.sft_steps", self.objective.sft_steps),
            ("objective.rl_only_steps", self.objective.rl_only_steps),
        ):
            require(value <= self.run.steps, f"{name}={value}", f"must not exceed run.steps={self.run.steps}")
        self._require_objective()
        self._require_refit()
        self._require_family()
        require(
            self.optimizer.distributed or not self.model.fp8.param_gather,
            "model.fp8.param_gather=true",
            "needs optimizer.distributed=true, which gathers parameters",
        )
        require(
            not (self.optimizer.overlap_param_gather and self.model.fp8.param_gather),
            "optimizer.overlap_param_gather=true",
            "needs model.fp8.param_gather=false: quantised parameters are gathered at the end of the update",
        )

    def _require_objective(self) -> None:
        """Require the objective, the source of its log-probs and the rollouts to suit each other."""
        require(
            self.old_logp.source == "trainer" or not self.objective.importance.is_on(),
            "objective.importance",
            "needs old_logp.source=trainer: with the servers' log-probs for π_old there is no mismatch to correct",
        )
        require(
            self.rollout.mode == "sync" or self.objective.importance.is_on() or self.old_logp.source == "server",
            "rollout.mode=async",
            "samples come from older weights: correct for that with objective.importance (cap: 2.0 is usual), or set "
            "old_logp.source=server, where the clipped ratio is relative to the weights that sampled",
        )
        require(
            self.objective.replay != "trainer" or self.old_logp.source == "trainer",
            "objective.replay=trainer",
            "needs old_logp.source=trainer, whose pass chooses the experts",
        )
        require(
            self.objective.replay != "rollout" or self.rollout.servers.router is None,
            "objective.replay=rollout",
            "needs rollout.servers.router=null: sglang-router drops the request for experts. The run balances the load "
            "over rollout.servers.urls itself",
        )
        require(
            self.objective.alpha != "auto" or self.probe.every > 0,
            "objective.alpha=auto",
            "needs probe.every: α follows the probe's estimates",
        )

    def _require_refit(self) -> None:
        """Require the servers to take refits as the config says."""
        require(
            not (self.refit.offload_servers and self.rollout.servers.urls),
            "refit.offload_servers=true",
            "needs servers that the run starts: those of rollout.servers.urls may have other clients",
        )
        require(
            not (self.refit.offload_servers and self.rollout.mode == "async"),
            "refit.offload_servers=true",
            "needs rollout.mode=sync: an asynchronous run's servers are never idle",
        )
        require_refittable(self.rollout.servers.extra_args, self.refit.transport)

    def _require_family(self) -> None:
        """Require what a model without a name table can do."""
        if self.model.family == "auto":
            return
        for name, value, allowed in (
            ("refit.transport", self.refit.transport, ("auto", "broadcast", "disk")),
            ("refit.quantize", self.refit.quantize, ("none",)),
            ("model.fp8.recipe", self.model.fp8.recipe, ("none",)),
            ("objective.replay", self.objective.replay, ("off",)),
            ("probe.every", self.probe.every, (0,)),
            ("run.smoke", self.run.smoke, (False,)),
        ):
            shown = str(value).lower() if isinstance(value, bool) else value
            rule = f"must be {' or '.join(str(item).lower() for item in allowed)} with model.family=bridge"
            require(value in allowed, f"{name}={shown}", f"{rule}, as the model has no name table")

    @property
    def servers(self) -> ServersConfig:
        """Return ``rollout.servers`` with the flags of SGLang that other sections ask for."""
        servers = self.rollout.servers
        if self.objective.replay != "rollout" or ROUTES_FLAG in servers.extra_args:
            return servers
        return replace(servers, extra_args=(*servers.extra_args, ROUTES_FLAG))

    @property
    def token_multiple(self) -> int:
        """Multiple to which the tokens of a microbatch on one rank are padded: the least common multiple of the user's
        and the FP8 recipe's."""
        return math.lcm(self.batching.token_multiple, self.model.fp8.token_multiple)
