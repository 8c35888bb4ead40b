"""The bounds that the config of a run sets to its records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dypo.config.tree import Config


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """The bounds of one run. Versions are those of the weights: each optimizer step makes one."""

    max_gap: float
    """Largest mean gap of log-probs between trainer and servers."""
    in_rounds: bool
    """The run collects in rounds, so that the weights with which a step begins sample all rollouts of its collection.
    From a stream rollouts may be older."""
    max_lag: int
    """Versions that a rollout may be behind when its group comes in."""
    max_staleness: float
    """Versions that a sample may be behind in its update."""
    max_waiting: int
    """Prompts in the queues after an update, or in flight."""
    max_buffered: int
    """Teachers' traces in the buffers of all replicas."""
    max_open: int
    """Prompts with updates left that are in no queue, because the rollout batch has them."""
    trainer_measures: bool
    """Each update measures the gap of its rollouts. Otherwise the servers' log-probs are used, and checked at times."""
    servers_are_checked: bool


def allowed_by(config: Config, max_gap: float) -> Allowed:
    """Return the bounds of a run with this config."""
    from megatron_dypo.objective.recipes.registry import build_objective  # imports torch

    batching, rollout, buffer = config.batching, config.rollout, build_objective(config.objective).trace_buffer()
    updates = batching.updates_per_batch * batching.epochs_per_batch
    # A collection ends at a number of draws. A stream has up to two rollout batches in flight beyond it.
    drawn = rollout.prompts_per_round * batching.max_collect_rounds
    ahead = math.ceil(2 * rollout.oversample * batching.prompts_per_batch) if rollout.uses_stream else 0
    # The update of buffered traces makes one version more in each rollout batch. Buffered traces may be of any age.
    lag = batching.max_version_lag + (batching.max_staleness if buffer else 0)
    return Allowed(
        max_gap=max_gap,
        in_rounds=not rollout.uses_stream,
        max_lag=lag,
        max_staleness=math.inf if buffer else lag + updates - 1,
        max_waiting=drawn + ahead,
        max_buffered=buffer.keeps * config.parallel.mesh().data if buffer else 0,
        max_open=batching.prompts_per_batch if updates > 1 else 0,
        trainer_measures=config.old_logp.source == "trainer",
        servers_are_checked=config.old_logp.source == "server" and config.old_logp.check_every > 0,
    )
