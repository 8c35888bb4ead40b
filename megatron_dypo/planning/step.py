"""Estimate the seconds of one optimizer step, part by part: rollout, log-probs, update, refit. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.planning.memory import largest_counts, model_state, optimizer_bytes
from megatron_dypo.planning.parameters import served_bytes
from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.training import PassTime, logprob_time, swap_time, update_flops, update_time

REFIT_S = 1.0
"""Seconds for pausing the servers, HTTP calls and flushing caches."""
DISK = 2e9
"""Bytes/s of a shared file system, for one writer."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step. Work that is done once for a rollout batch counts by the step's share of it."""

    is_async: bool
    """Whether ``rollout.mode`` is ``async``: the next rollouts are sampled during log-probs and update."""
    rollout: float
    logprobs: float
    update: PassTime
    refit: float
    switch: float
    """Servers on the trainer's GPUs go to sleep and wake; weights and optimizer leave the GPU and return."""
    checkpoint: float
    """The share of a checkpoint."""
    loop: float
    """Data, grading, advantages and logs."""
    tokens: float
    """Tokens that enter the update."""
    generated: float
    """Tokens sampled for the step."""
    aborted: float
    """Additional tokens of aborted requests."""
    mfu: float
    """FLOPs of the model divided by those that the trainer's GPUs could do in bf16 during the update; with FP8 too."""

    @property
    def trainer(self) -> float:
        return self.logprobs + self.update.total

    @property
    def common(self) -> float:
        """Return the seconds in which trainer and servers are both stopped."""
        return self.refit + self.switch + self.checkpoint + self.loop

    @property
    def total(self) -> float:
        """Return the seconds of a step of the loop that the config asks for."""
        return self.overlapped if self.is_async else self.sequential

    @property
    def sequential(self) -> float:
        """Return the seconds of a step whose parts run one after the other, as in the synchronous loop."""
        return self.rollout + self.trainer + self.common

    @property
    def overlapped(self) -> float:
        """Return the seconds of a step that samples the next batch's rollouts during log-probs and update."""
        return max(self.rollout, self.trainer) + self.common

    @property
    def trainer_idle(self) -> float:
        """Return the share of ``total`` in which the trainer waits."""
        return 1 - (self.trainer + self.common) / self.total

    @property
    def rollout_idle(self) -> float:
        return 1 - (self.rollout + self.common) / self.total


def step_time(setting: Setting) -> StepTime:
    cfg = setting.config
    batching = cfg.batching
    update = update_time(setting)
    prompts = batching.prompts_per_update / setting.group.learned / batching.epochs_per_batch
    collected = rollout_round(setting)
    rounds = prompts / collected.prompts
    updates = batching.updates_per_batch * batching.epochs_per_batch
    peak = setting.trainer_gpus * setting.gpu.bf16
    return StepTime(
        is_async=cfg.rollout.mode == "async",
        rollout=rounds * collected.seconds,
        logprobs=_logprobs(setting, prompts),
        update=update,
        refit=refit_time(setting) / updates,
        switch=_switch_time(setting) / updates,
        checkpoint=_checkpoint_time(setting),
        loop=setting.constants.loop_s / updates,
        tokens=setting.sequences_per_update * setting.sequence_tokens,
        generated=prompts * setting.group.rollouts * setting.assumed.response_tokens,
        aborted=rounds * collected.aborted,
        mfu=update_flops(setting) / update.total / peak,
    )


def trainer_seconds(setting: Setting) -> float:
    """Return the seconds that depend on the trainer alone: log-probs, update, and a step's share of a checkpoint."""
    batching = setting.config.batching
    prompts = batching.prompts_per_update / setting.group.learned / batching.epochs_per_batch
    return _logprobs(setting, prompts) + update_time(setting).total + _checkpoint_time(setting)


def refit_time(setting: Setting) -> float:
    """Return the seconds of sending all weights to all servers; quantised weights are sent in FP8."""
    refit = setting.config.refit
    size, transport = served_bytes(setting.arch, setting.element, refit.quantize).total, refit.transport
    rate = setting.constants.refit * setting.gpu.network
    if transport == "disk":
        return REFIT_S + 2 * size / DISK
    if transport == "broadcast":
        # Pipeline stages send in turn, each through the network port of its first rank.
        return REFIT_S + size / rate
    mesh = setting.server_mesh
    held = served_bytes(setting.arch, setting.element, refit.quantize, mesh.attention_data).total
    return REFIT_S + max(held / mesh.tensor, held * setting.num_servers / setting.trainer_gpus) / rate


def _switch_time(setting: Setting) -> float:
    """Return the seconds of handing the GPUs over to servers on them, and back."""
    if not setting.is_colocated:
        return 0.0
    moved = 0.0
    if setting.frees_trainer:
        state = model_state(setting, largest_counts(setting))
        moved = 2 * sum(term.bytes for term in state if term.name != "gradients")
    return setting.constants.switch_s + moved / setting.gpu.pcie


def _checkpoint_time(setting: Setting) -> float:
    """Return a step's share of the seconds in which a checkpoint stops the run, each node writing its part."""
    cfg = setting.config
    if not cfg.checkpoint.every:
        return 0.0
    shards = setting.trainer_gpus / setting.data / cfg.parallel.context
    size = largest_counts(setting).total * (setting.element + optimizer_bytes(cfg, setting.element)) * shards
    nodes = max(1.0, setting.trainer_gpus / setting.gpus_per_node)
    seconds = size / (nodes * DISK)
    return (0.1 if cfg.checkpoint.async_save else 1.0) * seconds / cfg.checkpoint.every


def reads_reference(setting: Setting) -> bool:
    """Return whether π_ref has its own weights and its own forward pass; if not, it is π_old or unused."""
    objective = setting.config.objective
    return build_objective(objective).needs_reference() and objective.reference.mode != "old"


def _logprobs(setting: Setting, prompts: float) -> float:
    """Return the seconds for log π_old and log π_ref of the rollouts that are learned from."""
    rollouts = prompts * setting.group.learned_rollouts
    if not rollouts:
        return 0.0
    once = logprob_time(setting, rollouts).total
    old = once if setting.config.old_logp.source == "trainer" else 0.0
    return old + (once + swap_time(setting) if reads_reference(setting) else 0.0)
