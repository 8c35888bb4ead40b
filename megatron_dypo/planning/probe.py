"""Estimate what one probe costs: its rollouts, the scores of its trajectories, and memory. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.models.gradient_projection import BLOCK, KEPT_ENTRIES
from megatron_dypo.planning.memory import largest_counts
from megatron_dypo.planning.parameters import whole_model
from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.training import pass_time

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
    """Seconds of the gradients and their projections."""
    update: float
    """Seconds of updates that learn from the same trajectories one by one: the yardstick for ``scores``."""
    device_bytes: float
    """Memory that the projection needs beside an update's: the same for any number of trajectories."""
    host_bytes: float
    """Memory of the projected scores on the first leader."""


def probe_cost(setting: Setting) -> ProbeCost:
    """Return the cost of one probe with the section ``probe`` of the config."""
    cfg = setting.config
    rollouts = cfg.probe.prompts * cfg.probe.repeats * cfg.rollout.group_size
    trajectories = rollouts + cfg.probe.prompts * len(cfg.data.teachers or range(TEACHERS))
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
        scores=rounds * (one.total - one.data - one.optimizer + projection),
        update=rounds * one.total,
        device_bytes=BLOCK["cuda"] * 8 + min(KEPT_ENTRIES, counts) * 4 + 3 * size * 8,
        host_bytes=trajectories * size * 4,
    )


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
