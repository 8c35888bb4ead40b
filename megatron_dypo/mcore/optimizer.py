"""Adam or Muon over the chunks of this rank, with gradient clipping and a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import Adam, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.muon import get_megatron_muon_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.mcore.compat.main_params import copy_main_params
from megatron_dypo.mcore.fp8 import optimizer_settings
from megatron_dypo.mcore.options.denied import OPTIMIZER
from megatron_dypo.mcore.options.reading import Mapped, make
from megatron_dypo.mcore.param_gather import begin_gather, keep_whole

_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd", "optimizer")
"""Settings that all parameter groups of a run share. Core 0.19 finds a stored group by these too."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one update, the same on every rank."""

    ok: bool
    """False: some gradient was not finite, and the weights are unchanged."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    """Learning rate of this update."""


class PolicyOptimizer:
    """Megatron's optimizer and its schedule, stepped together. Update k (from 1) uses the k-th rate of the schedule."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        megatron: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        algorithm: str = "adam",
    ) -> None:
        self.megatron = megatron
        self.num_updates = 0
        """Number of updates tried so far; a checkpoint stores it."""
        self._chunks = chunks
        self._scheduler = scheduler
        self._algorithm = algorithm

    @property
    def kind(self) -> str:
        """Return the class of Megatron's optimizer and its algorithm, which determine the content of a checkpoint."""
        wrapper = type(self.megatron.chained_optimizers[0]).__name__
        return wrapper if self._algorithm == "adam" else f"{wrapper} of {self._algorithm}"

    def zero_grad(self) -> None:
        """Clear the gradients, before the forward-backward passes of an update."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self) -> StepResult:
        """Clip and apply the gradients. Collective over the world."""
        self.num_updates += 1
        self._scheduler.num_steps = self.num_updates
        self._scheduler.step(0)
        lr = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        # Without a loss scaler Megatron would multiply a NaN norm into every weight.
        if not math.isfinite(grad_norm):
            return StepResult(ok=False, grad_norm=grad_norm, lr=lr)
        ok, _, _ = self.megatron.step()
        begin_gather(self._chunks)
        return StepResult(ok=bool(ok), grad_norm=grad_norm, lr=lr)

    def fill_state(self) -> None:
        """Make the moments of a fused Adam that has made no step, as Megatron's checkpoints need them.

        That is so if no gradient was finite, or no sample had a gradient. Torch's Adam is filled by ``without_te.py``.
        """
        for optimizer in self.megatron.chained_optimizers:
            inner = optimizer.optimizer
            if isinstance(inner, Adam) and not isinstance(inner, torch.optim.Adam) and not inner.state:
                optimizer.init_state_fn(inner, optimizer.config)

    def load_state(self, state: Any) -> None:
        """Load the moments and main parameters of a checkpoint, but keep every setting of this run's config.

        Megatron's ``load_state_dict`` would also restore the old learning rates, betas, epsilon and weight decay of the
        parameter groups, from which the schedule reads its bounds.
        """
        settings = [_settings(group) for group in self.megatron.param_groups]
        stored = next(_stored_groups(state), {})
        for group in self.megatron.param_groups:
            group.update({name: stored[name] for name in _SCHEDULE if name in stored})
        self.megatron.load_state_dict(state)
        for group, own in zip(self.megatron.param_groups, settings, strict=True):
            group.update(own)

    def reload_weights(self) -> None:
        """Copy the model's parameters into the fp32 main parameters, after other code changed them."""
        self.megatron.reload_model_params()

    def rewrite_weights(self) -> None:
        """Copy the fp32 main parameters into the model's, as at the end of an update. Collective over the world.

        Call it only with a distributed optimizer.
        """
        for optimizer in self.megatron.chained_optimizers:
            copy_main_params(optimizer)
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)


def _stored_groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameter groups in the state of one optimizer or of several."""
    if isinstance(state, Mapping):
        yield from state.get("param_groups", ())
        yield from (group for key, inner in state.items() if key != "state" for group in _stored_groups(inner))
    elif isinstance(state, list):
        yield from (group for inner in state for group in _stored_groups(inner))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group without its parameters and its number of steps."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    dtype: str,
    total_steps: int,
    fp8: Fp8Config | None = None,
) -> PolicyOptimizer:
    """Build the optimizer of chunks whose weights are already loaded.

    Decoupled weight decay applies to matrices, not to norms and biases. The rate rises linearly over ``warmup_steps``.
    A decaying schedule would reach ``min_lr`` one update after ``total_steps``, so that no update has the rate 0.

    Args:
        dtype: ``ModelConfig.dtype``; main parameters, gradients and moments are fp32 in any case.
        total_steps: number of updates of the whole run.
        fp8: ``ModelConfig.fp8``, if any.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if config.warmup_steps > total_steps:
        raise ValueError(f"warmup_steps={config.warmup_steps}: must not exceed the run's steps={total_steps}")
    settings = optimizer_config(config, dtype=dtype, fp8=fp8)
    make_optimizer = get_megatron_muon_optimizer if config.algorithm == "muon" else get_megatron_optimizer
    megatron = make_optimizer(settings, list(chunks))
    keep_whole(chunks)
    scheduler = _scheduler(megatron, config, total_steps)
    return PolicyOptimizer(chunks, megatron, scheduler, algorithm=config.algorithm)


def optimizer_config(config: OptimizerConfig, *, dtype: str, fp8: Fp8Config | None = None) -> MegatronOptimizerConfig:
    """Return Megatron's configuration of the optimizer.

    Raises:
        ValueError: ``optimizer.megatron`` names a field that is denied, unknown or of another type, or Megatron refuses
            the values.
    """
    return make(
        MegatronOptimizerConfig,
        Mapped("optimizer.megatron", config.megatron, OPTIMIZER),
        _named(config),
        optimizer=config.algorithm,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == "bfloat16",
        params_dtype=getattr(torch, dtype),
        use_distributed_optimizer=config.distributed,
        overlap_param_gather=config.overlap_param_gather,
        use_precision_aware_optimizer=config.precision_aware,
        optimizer_cpu_offload=config.cpu_offload > 0,
        optimizer_offload_fraction=config.cpu_offload,
        **optimizer_settings(fp8 or Fp8Config()),
    )


def _named(config: OptimizerConfig) -> dict[str, Any]:
    """Return the keys of the config whose values Megatron itself may refuse."""
    named = {"algorithm": "adam", "precision_aware": False, "cpu_offload": 0.0}
    return {f"optimizer.{name}": value for name in named if (value := getattr(config, name)) != named[name]}


def _scheduler(megatron: MegatronOptimizer, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=total_steps + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
