"""Estimate what one probe costs: its rollouts, the scores of its trajectories, and memory. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.models.gradient_projection import BLOCK, KEPT_ENTRIES
from megatron_dypo.planning.memory import largest_counts
from megatron_dypo.planning.parameters import whole_model
from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import reads_reference
from megatron_dypo.planning.training import logprob_time, pass_time, swap_time

TEACHERS = 2
"""Teachers whose traces are scored, where the config does not name them; the paper's m."""
_HASH_PASSES = 14
"""Reads and writes of a 4-byte number for each entry of a gradient, to hash its address."""


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """The cost of one probe."""

    trajectories: int
    """Rollouts and traces whose gradients are projected."""
    rollout: float
    """Seconds of sampling."""
    scores: float
    """Seconds of the gradients, of their projections and of log π_ref."""
    update: float
    """Seconds of updates that learn from the same trajectories one by one: the yardstick for ``scores``."""
    device_bytes: float
    """Memory that the projection needs beside an update's: the same for any number of trajectories. The inputs of the
    pass for log π_ref, at most 41 bytes a token, are not in it."""
    host_bytes: float
    """Memory on the first leader's host for the scores of all replicas and their estimates; see :func:`host_bytes`."""


def probe_cost(setting: Setting) -> ProbeCost:
    """Return the cost of one probe with the section ``probe`` of the config."""
    cfg = setting.config
    each, teachers = cfg.probe.repeats * cfg.rollout.group_size, len(cfg.data.teachers or range(TEACHERS))
    trajectories = cfg.probe.prompts * (each + teachers)
    # Replicas that share experts compute every score together (mcore/scores.py).
    rounds = trajectories if setting.mesh.replicas_share_experts else -(-trajectories // setting.data)
    alone = _one_sequence(setting)
    passes = 3 + (cfg.model.recompute == "full")
    one = pass_time(alone, sequence_cost(setting.arch, cfg.model.recompute), setting.data, passes, is_update=True)
    counts = largest_counts(setting).total
    projection = counts * (2 * 4 + _HASH_PASSES * 4) / setting.gpu.hbm  # gradients are zeroed and read
    size = cfg.probe.dimension or whole_model(setting.arch).total
    return ProbeCost(
        trajectories=trajectories,
        rollout=rollout_round(_sampling(setting)).seconds,
        scores=rounds * (one.total - one.data - one.optimizer + projection) + _reference(setting, trajectories),
        update=rounds * one.total,
        device_bytes=BLOCK["cuda"] * 8 + min(KEPT_ENTRIES, counts) * 4 + 3 * size * 8,
        host_bytes=host_bytes(cfg.probe.prompts, each, teachers, size, is_joined=setting.data > 1),
    )


def host_bytes(prompts: int, each: int, teachers: int, size: int, *, is_joined: bool) -> float:
    """Return the peak of the first leader's memory for N scores of ``size`` numbers, 4 bytes each, and their estimates.

    It grows with N. Estimates hold the scores, and gradients in float64: of every prompt and teacher, or of the
    rollouts of one prompt. Before that, the scores of several replicas are there twice: as parts, and sorted. A check
    of the scores takes one more byte a number.

    Args:
        each: rollouts of a prompt.
        is_joined: whether there are several replicas.
    """
    scores = 4.0 * size * prompts * (each + teachers)
    gradients = 8.0 * size * max(prompts * (3 * teachers + 1), 5 * prompts, prompts + 4.5 * each)
    return max((2.25 if is_joined else 1.25) * scores, scores + gradients)


def _reference(setting: Setting, trajectories: float) -> float:
    """Return the seconds of log π_ref; 0 without a reference of its own. The gradients' forward passes have log π."""
    return logprob_time(setting, trajectories).total + swap_time(setting) if reads_reference(setting) else 0.0


def _one_sequence(setting: Setting) -> Setting:
    """Return a setting whose update is one microbatch: a trajectory passes the stages one after the other."""
    cfg = setting.config
    return replace(
        setting,
        config=replace(
            cfg,
            parallel=replace(cfg.parallel, virtual_pipeline=None),
            batching=replace(cfg.batching, tokens_per_microbatch=2**40),
        ),
    )


def _sampling(setting: Setting) -> Setting:
    """Return a setting whose round of rollouts is that of a probe."""
    cfg = setting.config
    rollout = replace(
        cfg.rollout,
        mode="sync",
        oversample=1.0,
        prompts_per_round=cfg.probe.prompts,
        group_size=cfg.probe.repeats * cfg.rollout.group_size,
    )
    return replace(setting, config=replace(cfg, rollout=rollout))
