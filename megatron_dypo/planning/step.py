"""Seconds of one optimizer step of the loop, by its parts: rollout, score, update, push. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.planning.parameters import whole_model
from megatron_dypo.planning.serving import decode_step_s, make_engine, prefill_s
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.training import PassTime, score_time, swap_time, update_flops, update_time

PUSH_S = 1.0
"""Pausing the servers, HTTP calls, flushing caches."""
PUSH_EFFICIENCY = 0.5
"""Share of a link that pushes of weights reach."""
DISK = 2e9
"""Bytes/s of a shared file system, for one writer."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds, for one optimizer step; of what is done once a rollout batch, the step's share."""

    rollout: float
    score: float
    update: PassTime
    push: float
    tokens: float
    """Tokens that enter the update."""
    generated: float
    """Tokens sampled for it."""
    mfu: float
    """FLOPs of the model over those that the trainer's GPUs could do while they score and update: of the update alone."""

    @property
    def trainer(self) -> float:
        return self.score + self.update.total

    @property
    def total(self) -> float:
        """The parts one after the other, as the synchronous loop does them."""
        return self.rollout + self.trainer + self.push

    @property
    def overlapped(self) -> float:
        """With the next batch's rollouts beside the update."""
        return max(self.rollout, self.trainer) + self.push

    @property
    def trainer_idle(self) -> float:
        """Share of the synchronous step."""
        return self.rollout / self.total

    @property
    def rollout_idle(self) -> float:
        return self.trainer / self.total


def step_time(setting: Setting) -> StepTime:
    cfg = setting.config
    batching = cfg.batching
    update = update_time(setting)
    prompts = batching.prompts_per_update / (1 - setting.assumed.easy) / batching.epochs_per_batch
    rounds = prompts / cfg.rollout.prompts_per_step
    updates = batching.updates_per_batch * batching.epochs_per_batch
    peak = setting.trainer_gpus * setting.gpu.bf16
    return StepTime(
        rollout=rounds * rollout_time(setting),
        score=_score(setting, prompts),
        update=update,
        push=push_time(setting) / updates,
        tokens=setting.sequences_per_update * setting.sequence_tokens,
        generated=prompts * cfg.rollout.group_size * setting.assumed.response_tokens,
        mfu=update_flops(setting) / update.total / peak,
    )


def rollout_time(setting: Setting) -> float:
    """One round of ``rollout.prompts_per_step`` prompts.

    While requests wait, each server runs as many as its KV cache and the clients allow; then the batch shrinks until the
    longest response, taken to reach the limit, is done.
    """
    cfg, engine, assumed = setting.config.rollout, make_engine(setting), setting.assumed
    requests = cfg.prompts_per_step * cfg.group_size / setting.engines
    allowed = min(requests, cfg.max_in_flight * setting.data / setting.engines)
    batch = max(1.0, min(allowed, engine.concurrency(assumed.prompt_tokens + assumed.response_tokens / 2)))
    full = max(0.0, requests - batch) * assumed.response_tokens / batch * decode_step_s(setting, engine, batch)
    longest = max(cfg.max_new_tokens, assumed.response_tokens)
    mean_batch = max(1.0, batch * assumed.response_tokens / longest)
    drain = longest * decode_step_s(setting, engine, mean_batch)
    # The responses of a group share their prompt's prefix.
    return full + drain + prefill_s(setting, requests / cfg.group_size * assumed.prompt_tokens)


def push_time(setting: Setting) -> float:
    """All weights to all servers."""
    size, transport = whole_model(setting.arch).total * setting.element, setting.config.weights.transport
    rate = PUSH_EFFICIENCY * setting.gpu.network
    if transport == "disk":
        return PUSH_S + 2 * size / DISK
    if transport == "broadcast":
        # Stages take turns, each through the network port of its first rank.
        return PUSH_S + size / rate
    received = size / setting.config.rollout.servers.tensor_parallel
    return PUSH_S + max(received, size * setting.engines / setting.trainer_gpus) / rate


def reads_reference(setting: Setting) -> bool:
    """Whether π_ref is held and scored, rather than π_old taken for it."""
    objective = setting.config.objective
    return build_objective(objective).needs_reference() and objective.reference.mode != "old"


def _score(setting: Setting, prompts: float) -> float:
    """log π_old and log π_ref of the rollouts of Mid prompts."""
    rollouts = prompts * setting.mid * setting.config.rollout.group_size
    once = score_time(setting, rollouts).total
    old = once if setting.config.score.policy == "trainer" else 0.0
    return old + (once + swap_time(setting) if reads_reference(setting) else 0.0)
