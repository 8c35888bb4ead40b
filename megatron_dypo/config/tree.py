"""The configuration tree: frozen dataclasses, one default in one place, a ValueError for each broken rule.

A field's docstring is its documentation. Reading YAML and overrides is in :mod:`megatron_dypo.config.load`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive, require_sound_values
from megatron_dypo.config.data import DataConfig, Format
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.objective import (
    ObjectiveConfig,
    ScoreConfig,
)
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.parallel.cut import PipelineCut

_MAX_SET_NAME = 80
"""Bytes of an evaluation set's name: escaped, it is a folder's name."""

MAX_SEED = 2**31
"""Servers and NumPy take seeds of 32 bits, and some are the run's plus an index."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how long it lasts."""

    dir: str = "runs/default"
    """Run folder; an existing one is resumed from its last checkpoint."""
    steps: int = 100
    """Optimizer steps in the whole run, resumed parts included."""
    seed: int = 1
    """Seeds shuffling, the teacher draw and the model-parallel RNGs."""
    resume: bool = True
    """False: refuse a run folder that already holds a checkpoint."""
    check_memory: bool = True
    """On GPUs: refuse a run that by `megatron-dypo plan`'s arithmetic does not fit."""
    watchdog_s: float = 1800.0
    """Seconds without a sign of life after which a rank counts as hung and the run ends; 0: wait indefinitely. Waiting
    for other ranks, and for rollouts that come one by one, is no hang."""
    allow_changed: tuple[Literal["data"], ...] = ()
    """What may differ from the run that is resumed. ``data``: the prompt files, their order or ``run.seed``; the positions of
    the checkpoint then mean other rows, and a warning says so."""

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        require_not_negative(self, "watchdog_s")
        require(bool(self.dir.strip()), f"dir={self.dir!r}", "is required: the run folder")
        require(0 <= self.seed < MAX_SEED, f"seed={self.seed}", "must be in [0, 2^31)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    hf_path: str = ""
    """HF model folder: ``config.json``, safetensors and tokenizer files."""
    mcore_path: str | None = None
    """Megatron dist_checkpointing folder with initial weights; ``hf_path`` then gives architecture and tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters in forward and backward; main weights of the optimizer are fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation, as Megatron's ``recompute_granularity``."""
    logprob_memory_mib: float | None = None
    """MiB of scratch for logits, from which follows how many response tokens are scored at a time (one at least, and more
    give nothing but speed); None: half of this rank's output weight in fp32, and 256 at least."""
    moe_aux_loss_coef: float | None = None
    """Mixture of experts: weight of the load-balancing loss; None: ``router_aux_loss_coef`` of the HF config."""
    fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        require(bool(self.hf_path), "hf_path=''", "is required: an HF model folder")
        require(
            not self.fp8.is_on or self.dtype == "bfloat16",
            f"fp8.recipe={self.fp8.recipe}",
            f"needs dtype=bfloat16 around it, got {self.dtype}",
        )
        if self.moe_aux_loss_coef is not None:
            require_not_negative(self, "moe_aux_loss_coef")
        if self.logprob_memory_mib is not None:
            require_positive(self, "logprob_memory_mib")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes of the training mesh; data parallelism is what is left of the world."""

    num_processes: int | None = None
    """Ranks to start when not under torchrun; default: as few as the axes allow."""
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """Model chunks on each pipeline rank (interleaved schedule); None: one."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage (Megatron's ``num_layers_in_first_pipeline_stage``), over all its chunks; stages
    of which this is not said share out the rest evenly. None: as many as those."""
    last_stage_layers: int | None = None
    """The same of the last stage, which has the output layer besides."""
    context: int = 1
    """Context parallelism: ranks that share each packed row, two chunks of every sequence each (zig-zag)."""
    expert: int = 1
    """Ranks that a layer's experts are spread over, out of the tensor × context × data ranks of a pipeline stage."""
    expert_tensor: int = 1
    """Ranks that each expert is split over (Megatron's expert tensor parallelism), neighbours in the same stage; whatever
    ``tensor`` is, 1 keeps experts whole."""
    sequence: bool = False
    """Sequence parallelism (Megatron's ``--sequence-parallel``); needs tensor > 1."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "context", "expert", "expert_tensor")
        require(not self.sequence or self.tensor > 1, "sequence=true", f"needs tensor > 1, got {self.tensor}")
        if self.virtual_pipeline is not None:
            require(self.virtual_pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "must be at least 2")
            require(self.pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "needs pipeline > 1")
        _ = self.cut  # whose rules hold here
        if self.num_processes is not None:
            model_size = self.tensor * self.pipeline * self.context
            require(
                self.num_processes > 0 and self.num_processes % model_size == 0,
                f"num_processes={self.num_processes}",
                f"must be a multiple of tensor × pipeline × context = {model_size}",
            )
            require(
                self.num_processes // self.pipeline % self.expert_ranks == 0,
                f"expert × expert_tensor = {self.expert} × {self.expert_tensor}",
                f"does not divide the {self.num_processes // self.pipeline} ranks of a pipeline stage",
            )

    @property
    def cut(self) -> PipelineCut:
        """Which stage holds which layers."""
        return PipelineCut(
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline or 1,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold all experts of a layer once."""
        return self.expert * self.expert_tensor

    @property
    def local_ranks(self) -> int:
        """Ranks to start on this machine: ``num_processes``, else one replica."""
        stage = math.lcm(self.tensor * self.context, self.expert_ranks)
        return self.num_processes or self.pipeline * stage


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How samples become microbatches and when an update is made."""

    prompts_per_update: int = 128
    """Hard and Mid prompts in one optimizer step."""
    updates_per_batch: int = 1
    """Mini-batches of ``prompts_per_update`` prompts in one rollout batch. Collection goes on until the queues hold a
    rollout batch; each mini-batch is an optimizer step; the servers get the weights after the last."""
    epochs_per_batch: int = 1
    """Passes over the mini-batches of a rollout batch."""
    max_collect_rounds: int = 8
    """Rounds of collection after which updates are made with what the queues hold."""
    tokens_per_microbatch: int = 16384
    """Packing budget of one microbatch, over all context-parallel ranks; a longer sequence gets one of its own."""
    row_multiple: int = 1
    """Tokens that a rank holds of a packed row come in multiples of this; what ``model.fp8.recipe`` asks for is added by
    itself (``Config.row_multiple``)."""
    max_staleness: int = 4
    """Groups that have waited for more than this many rollout batches are dropped and counted."""

    def __post_init__(self) -> None:
        require_positive(self, "prompts_per_update", "updates_per_batch", "epochs_per_batch")
        require_positive(self, "max_collect_rounds", "tokens_per_microbatch", "row_multiple")
        require_not_negative(self, "max_staleness")

    @property
    def prompts_per_batch(self) -> int:
        """Prompts in one rollout batch."""
        return self.prompts_per_update * self.updates_per_batch

    @property
    def max_version_lag(self) -> int:
        """``max_staleness`` in versions, which are optimizer steps."""
        return self.max_staleness * self.updates_per_batch * self.epochs_per_batch


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule."""

    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6)."""
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    distributed: bool = False
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    max_bad_steps: int = 3
    """Updates in a row whose gradients are not finite, and which are skipped, that end the run."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps", "max_bad_steps")
        require_not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        require(self.min_lr <= self.lr, f"min_lr={self.min_lr}", f"must not exceed lr={self.lr}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value}", "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Megatron dist_checkpointing."""

    every: int = 50
    """Steps between checkpoints; the last step always saves. 0: only the last."""
    keep: int = 2
    """Checkpoints to keep; 0: all."""

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out accuracy through the same servers."""

    prompts: tuple[str, ...] | dict[str, str] = ()
    """Evaluation sets: a list of JSONL or Parquet files, each named after its file, or a mapping, name → file."""
    format: Format | None = None
    """How these files name their columns, as ``data.format``, with its usual names; None: as the training files."""
    every: int = 0
    """Steps between evaluations; 0: before the first and after the last step only."""
    samples_per_prompt: int = 1
    """Responses for each prompt."""
    temperature: float = 0.6
    max_prompts: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "samples_per_prompt")
        require_not_negative(self, "every", "temperature")
        if self.max_prompts is not None:
            require_positive(self, "max_prompts")
        for name, paths in self._paths_by_name().items():
            require(
                bool(name.strip()) and name not in (".", "..") and len(name.encode(errors="replace")) <= _MAX_SET_NAME,
                f"prompts: a set named {name!r} ({paths[0]})",
                f"a name is a part of metrics and a folder: at most {_MAX_SET_NAME} bytes, not blank, and neither . nor ..",
            )
            require(
                len(paths) == 1,
                f"prompts={list(self.prompts)}",
                f"{len(paths)} sets would be named {name!r}: give them names, as in prompts: {{first: {paths[0]}, "
                f"second: {paths[-1]}}}",
            )

    def _paths_by_name(self) -> dict[str, list[str]]:
        if isinstance(self.prompts, dict):
            return {name: [path] for name, path in self.prompts.items()}
        found: dict[str, list[str]] = {}
        for path in self.prompts:
            found.setdefault(PurePath(path).stem, []).append(path)
        return found

    @property
    def sets(self) -> dict[str, str]:
        """Name → file of each evaluation set."""
        return {name: paths[0] for name, paths in self._paths_by_name().items()}


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megatron_dypo"
    summary_every: int = 1
    """Steps between summary lines in the log."""
    samples_per_step: int = 0
    """Groups a step whose rollouts are written to ``samples/``; 0: all."""

    def __post_init__(self) -> None:
        require_positive(self, "summary_every")
        require_not_negative(self, "samples_per_step")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written after the last step."""

    hf: bool = True
    """An HF model folder ``<run.dir>/hf``."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require_sound_values(self)
        require(bool(self.data.prompts), "data.prompts=()", "name at least one JSONL or Parquet file")
        for name, value in (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("objective.sft_steps", self.objective.sft_steps),
            ("objective.rl_only_steps", self.objective.rl_only_steps),
        ):
            require(value <= self.run.steps, f"{name}={value}", f"must not exceed run.steps={self.run.steps}")
        require(
            self.score.policy == "trainer" or not self.objective.importance.is_on(),
            "objective.importance",
            "needs score.policy=trainer: with the servers' log-probs for π_old there is no mismatch to correct",
        )
        require(
            self.rollout.mode == "sync" or self.objective.importance.is_on() or self.score.policy == "rollout",
            "rollout.mode=async",
            "samples from older weights: correct for it with objective.importance (cap: 2.0 is usual), or take "
            "score.policy=rollout, whose clipped ratio is to the weights that sampled",
        )
        require(
            not (self.refit.offload_servers and self.rollout.servers.urls),
            "refit.offload_servers=true",
            "needs servers that the run starts: those of rollout.servers.urls may serve others",
        )
        require(
            not (self.refit.offload_servers and self.rollout.mode == "async"),
            "refit.offload_servers=true",
            "needs rollout.mode=sync: an asynchronous run's servers are never idle",
        )
        require(
            self.optimizer.distributed or not self.model.fp8.param_gather,
            "model.fp8.param_gather=true",
            "needs optimizer.distributed=true, which gathers parameters",
        )

    @property
    def row_multiple(self) -> int:
        """Tokens that a rank holds of a packed row come in multiples of this: the user's and that of the FP8 recipe."""
        return math.lcm(self.batching.row_multiple, self.model.fp8.row_multiple)
