"""The configuration tree: one frozen dataclass for each section, with every default and every cross-check.

A broken rule is a ValueError that names key, value and rule. The docstring of a field is its documentation:
:mod:`megatron_dypo.config.reference` makes the manual of them. :mod:`megatron_dypo.config.load` reads YAML and
overrides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive, require_sound_values
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.eval import EvalConfig
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.objective import (
    ObjectiveConfig,
    OldLogpConfig,
)
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.parallel.mesh import Mesh

MAX_SEED = 2**31
"""Upper bound of seeds. Servers and NumPy take 32 bits, and some seeds are the run's plus an index."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder and the length of the run."""

    dir: str = "runs/default"
    """Run folder. A run whose folder exists resumes from its last checkpoint."""
    steps: int = 100
    """Optimizer steps of the whole run, including the steps before a resume."""
    seed: int = 1
    """Seed of the shuffling, the draw of teachers and Megatron's random number generators."""
    resume: bool = True
    """Resume from the run folder's checkpoint. ``false``: refuse a run folder that holds one."""
    check_memory: bool = True
    """On GPUs, refuse a run that does not fit into memory by the arithmetic of ``megatron-dypo plan``."""
    watchdog_s: float = 1800.0
    """End the run when a rank makes no progress for this many seconds. 0: wait indefinitely. A rank that waits for
    other ranks, or for rollouts that still arrive, does not count as hung."""
    allow_changed: tuple[Literal["data"], ...] = ()
    """Parts of the config that may differ from the run that is resumed. ``data``: the prompt files, their order or
    ``run.seed``. The position in the data that the checkpoint stores then points at other rows; a warning says so."""

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        require_not_negative(self, "watchdog_s")
        require(bool(self.dir.strip()), f"dir={self.dir!r}", "is required: the run folder")
        require(0 <= self.seed < MAX_SEED, f"seed={self.seed}", "must be in [0, 2^31)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: its weights, its precision and its memory."""

    hf_path: str = ""
    """HF model folder with ``config.json``, safetensors and tokenizer files."""
    mcore_path: str | None = None
    """Folder with initial weights in Megatron's dist_checkpointing format. ``hf_path`` then gives only architecture and
    tokenizer. ``null``: take the weights of ``hf_path``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters in forward and backward passes. The optimizer's main parameters are always fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping (Megatron's ``recompute_granularity``)."""
    logprob_memory_mib: float | None = None
    """Scratch memory for logits in MiB. It sets how many response tokens are processed per chunk (at least one); it
    changes speed, not results. ``null``: half the size of this rank's output weight in fp32, and at least 256."""
    moe_aux_loss_coef: float | None = None
    """Mixture of experts: weight of the load-balancing loss. ``null``: ``router_aux_loss_coef`` of the HF config."""
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

    @property
    def element_size(self) -> int:
        """Bytes of one value of type ``dtype``."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes of the training mesh. Data parallelism follows from the number of ranks."""

    num_processes: int | None = None
    """Ranks to start when not under torchrun; None: as few as the axes allow."""
    tensor: int = 1
    """Tensor parallelism: ranks that share the matrices of each layer."""
    pipeline: int = 1
    """Pipeline parallelism: stages that the layers are spread over."""
    virtual_pipeline: int | None = None
    """Model chunks on each pipeline rank (interleaved schedule); None: one."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, in all its chunks (Megatron's ``num_layers_in_first_pipeline_stage``). None:
    as many as on the stages between first and last, which share the rest evenly."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which also has the output layer. None: as many as on the stages before it."""
    context: int = 1
    """Context parallelism: ranks that share each packed row. Each holds two parts of every sequence (zig-zag)."""
    expert: int = 1
    """Ranks that a layer's experts are spread over, out of the tensor × context × data ranks of a pipeline stage."""
    expert_tensor: int = 1
    """Ranks that each expert is split over (Megatron's expert tensor parallelism), neighbours in the same stage. 1
    keeps experts whole, at any ``tensor``."""
    sequence: bool = False
    """Sequence parallelism (Megatron's ``--sequence-parallel``); needs tensor > 1."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "context", "expert", "expert_tensor")
        require(not self.sequence or self.tensor > 1, "sequence=true", f"needs tensor > 1, got {self.tensor}")
        if self.virtual_pipeline is not None:
            require(self.virtual_pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "must be at least 2")
            require(self.pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "needs pipeline > 1")
        if self.num_processes is not None:
            self._check_world("num_processes", self.num_processes)
        _ = self.mesh()  # whose rules hold here

    def mesh(self, world_size: int | None = None) -> Mesh:
        """Return the mesh of ``world_size`` ranks, which gives data parallelism what the other axes leave.

        Args:
            world_size: None: :attr:`local_ranks`; for a caller to whom data parallelism does not matter.

        Raises:
            ValueError: e.g. ``world_size=6: must be a multiple of tensor × pipeline × context = 2 × 2 × 1 = 4``.
        """
        world_size = self.local_ranks if world_size is None else world_size
        self._check_world("world_size", world_size)
        return Mesh(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline or 1,
            context=self.context,
            data=world_size // (self.tensor * self.pipeline * self.context),
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    @property
    def fewest_ranks(self) -> int:
        """The smallest world that the axes can be laid out on; every other one is a multiple of it."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert * self.expert_tensor)

    @property
    def local_ranks(self) -> int:
        """Ranks to start on this machine."""
        return self.num_processes or self.fewest_ranks

    def _check_world(self, name: str, size: int) -> None:
        replica = self.tensor * self.pipeline * self.context
        require(
            size > 0 and size % replica == 0,
            f"{name}={size}",
            f"must be a multiple of tensor × pipeline × context = "
            f"{self.tensor} × {self.pipeline} × {self.context} = {replica}",
        )


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """The size of an update, of a rollout batch and of a microbatch."""

    prompts_per_update: int = 128
    """Hard and Mid prompts in one minibatch, which one optimizer step learns from."""
    updates_per_batch: int = 1
    """Minibatches of ``prompts_per_update`` prompts in one rollout batch. The run collects until the queues hold a
    whole rollout batch, takes one optimizer step for each minibatch, and refits the servers after the last one."""
    epochs_per_batch: int = 1
    """Passes over the minibatches of a rollout batch."""
    max_collect_rounds: int = 8
    """Rounds of collection after which the run updates with fewer prompts than a rollout batch should hold."""
    tokens_per_microbatch: int = 16384
    """Most tokens packed into one microbatch, over all context-parallel ranks. A sequence that is longer gets a
    microbatch of its own."""
    token_multiple: int = 1
    """Pad each microbatch so that the tokens on a rank are a multiple of this. The multiple that
    ``model.fp8.recipe`` needs is applied in addition (``Config.token_multiple``)."""
    max_staleness: int = 4
    """Drop, and count, groups that have waited for more than this many rollout batches."""

    def __post_init__(self) -> None:
        require_positive(self, "prompts_per_update", "updates_per_batch", "epochs_per_batch")
        require_positive(self, "max_collect_rounds", "tokens_per_microbatch", "token_multiple")
        require_not_negative(self, "max_staleness")

    @property
    def prompts_per_batch(self) -> int:
        """Prompts in one rollout batch."""
        return self.prompts_per_update * self.updates_per_batch

    @property
    def max_version_lag(self) -> int:
        """``max_staleness`` in versions of the weights; each optimizer step makes one."""
        return self.max_staleness * self.updates_per_batch * self.epochs_per_batch


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate between warm-up and ``run.steps``."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to ``lr``."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's ε, which is added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Scale gradients down to this global norm. 0: do not clip."""
    distributed: bool = False
    """Shard the optimizer state over the data-parallel ranks (Megatron's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass still runs."""
    max_bad_steps: int = 3
    """An update whose gradients are not finite is skipped. This many of them in a row end the run."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps", "max_bad_steps")
        require_not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        require(self.min_lr <= self.lr, f"min_lr={self.min_lr}", f"must not exceed lr={self.lr}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value}", "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many stay. The format is Megatron's dist_checkpointing."""

    every: int = 50
    """Steps between checkpoints. 0: only the last step, which always saves."""
    keep: int = 2
    """Newest checkpoints to keep. 0: all."""

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Outputs besides ``metrics.jsonl``, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events to ``<run.dir>/tensorboard``."""
    wandb: bool = False
    """Log to Weights & Biases; needs the extra ``wandb``."""
    wandb_project: str = "megatron_dypo"
    """Project of Weights & Biases."""
    summary_every: int = 1
    """Steps between summary lines in the log."""
    samples_per_step: int = 0
    """Groups per step whose rollouts are written to ``samples/``. 0: all."""

    def __post_init__(self) -> None:
        require_positive(self, "summary_every")
        require_not_negative(self, "samples_per_step")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The model that is written after the last step."""

    hf: bool = True
    """Write the policy as an HF model folder ``<run.dir>/hf``."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole config of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    old_logp: OldLogpConfig = field(default_factory=OldLogpConfig)
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
            self.old_logp.source == "trainer" or not self.objective.importance.is_on(),
            "objective.importance",
            "needs old_logp.source=trainer: with the servers' log-probs for π_old there is no mismatch to correct",
        )
        require(
            self.rollout.mode == "sync" or self.objective.importance.is_on() or self.old_logp.source == "server",
            "rollout.mode=async",
            "samples from older weights: correct for that with objective.importance (cap: 2.0 is usual), or set "
            "old_logp.source=server, where the clipped ratio is relative to the weights that sampled",
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
    def token_multiple(self) -> int:
        """Multiple to which the tokens of a microbatch on one rank are padded: the user's and the FP8 recipe's
        together."""
        return math.lcm(self.batching.token_multiple, self.model.fp8.token_multiple)
