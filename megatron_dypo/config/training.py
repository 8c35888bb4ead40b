"""The update's part of the configuration tree: its samples and its optimizer; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dypo.checks import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """The size of an update, of a rollout batch and of a microbatch."""

    prompts_per_update: int = 128
    """Hard and Mid prompts in one minibatch. One optimizer step learns from one minibatch."""
    updates_per_batch: int = 1
    """Minibatches of ``prompts_per_update`` prompts in one rollout batch. The run collects until the queues hold a
    whole rollout batch, takes one optimizer step for each minibatch, and refits the servers after the last one."""
    epochs_per_batch: int = 1
    """Passes over the minibatches of a rollout batch."""
    max_collect_rounds: int = 8
    """Rounds of collection after which the run updates even if it has fewer prompts than a whole rollout batch."""
    tokens_per_microbatch: int = 16384
    """Most tokens packed into one microbatch, over all context-parallel ranks. A sequence that is longer gets a
    microbatch of its own."""
    token_multiple: int = 1
    """Pad each microbatch so that the tokens on a rank are a multiple of this. The multiple that
    ``model.fp8.recipe`` needs is applied in addition (``Config.token_multiple``)."""
    max_staleness: int = 4
    """Drop and count groups that have waited for more than this many rollout batches."""

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
    """The optimizer and the schedule of its learning rate."""

    algorithm: Literal["adam", "muon"] = "adam"
    """``adam``: AdamW. ``muon``: Muon for the matrices of the layers, and AdamW for the rest; it needs the package
    ``emerging_optimizers``. ``optimizer.megatron`` has its fields (``muon_momentum`` and others)."""
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
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs ``distributed`` and ``overlap_grad_reduce``. A
    refit, a checkpoint or another reader of the weights gathers what is missing first."""
    precision_aware: bool = False
    """Keep gradients and moments in types that ``optimizer.megatron`` names (``main_grads_dtype``, ``exp_avg_dtype``,
    ``exp_avg_sq_dtype``), and of main parameters only the bits that the parameters lack. Needs ``distributed`` and
    Transformer Engine (Megatron's ``use_precision_aware_optimizer``)."""
    cpu_offload: float = 0.0
    """Share of the optimizer's state that is kept and stepped on the host (Megatron's ``optimizer_cpu_offload``). Needs
    ``distributed``, ``precision_aware`` and a GPU. 0: none."""
    max_bad_steps: int = 3
    """An update whose gradients are not finite is skipped. This many of them in a row end the run."""
    on_bad_step: Literal["skip", "stop", "roll_back"] = "skip"
    """The policy for such an update. ``skip``: as ``max_bad_steps`` says; a weight that is not finite ends the run at
    once. ``stop``: the first such update ends it. ``roll_back``: where ``skip`` would end the run, weights and
    optimizer go back to the last checkpoint, and the run goes on with the data that come next. The microbatches behind
    such an update are dumped for ``megatron-dypo replay``. The weights are looked at after each update that a refit, a
    checkpoint or a new reference follows."""
    max_rollbacks: int = 3
    """With ``roll_back``: one start of the run goes back at most this many times; the next time ends it."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """More fields of Megatron's ``OptimizerConfig``, such as ``{exp_avg_dtype: bfloat16}``. Names and types are those
    of the installed version. Fields that other keys decide are refused (docs/megatron_options.md)."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps", "max_bad_steps", "max_rollbacks")
        require_not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        require(self.min_lr <= self.lr, f"min_lr={self.min_lr}", f"must not exceed lr={self.lr}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value}", "must be in [0, 1)")
        self._require_partners()

    def _require_partners(self) -> None:
        """Require the options without which another one does not work."""
        require(0 <= self.cpu_offload <= 1, f"cpu_offload={self.cpu_offload}", "must be from 0 to 1")
        require(
            self.algorithm == "adam" or not self.distributed,
            f"algorithm={self.algorithm}",
            "needs distributed=false: it orthogonalises whole matrices",
        )
        require(
            not self.overlap_param_gather or (self.distributed and self.overlap_grad_reduce),
            "overlap_param_gather=true",
            "needs distributed=true and overlap_grad_reduce=true",
        )
        require(not self.precision_aware or self.distributed, "precision_aware=true", "needs distributed=true")
        require(
            not self.cpu_offload or self.precision_aware,
            f"cpu_offload={self.cpu_offload}",
            "needs precision_aware=true and distributed=true",
        )
