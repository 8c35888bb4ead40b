"""Held-out accuracy through the rollout servers."""

from __future__ import annotations

import logging
from dataclasses import replace

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.grading.verify import grade
from megatron_dypo.rollout.collect import collect
from megatron_dypo.run import Leader, Run
from megatron_dypo.tally import Tally, tally_groups

log = logging.getLogger("megatron_dypo")


def evaluate(run: Run) -> dict[str, float]:
    """Accuracy of every evaluation set under the servers' current weights, split over the replicas.

    Returns:
        ``eval/<set>/…`` metrics on the leaders, {} elsewhere and when there is no set.
    """
    metrics: dict[str, float] = {}
    if run.leader is None or run.leader.client is None:
        return metrics
    with run.timings.measure("eval"):
        for name in run.leader.held_out:
            total = Tally()
            for tally in gather_objects(_evaluate_share(run, run.leader, name), run.leader.group):
                total.merge(tally)
            metrics |= {
                f"eval/{name}/accuracy": total.ratio("correct", "rollouts"),
                f"eval/{name}/num_samples": total["rollouts"],
                f"eval/{name}/truncated_ratio": total.ratio("truncated", "rollouts"),
                f"eval/{name}/response_len/mean": total.ratio("sampled_tokens", "rollouts"),
            }
            if run.layout.is_global_leader:
                log.info("step %d: %s accuracy %.3f", run.step, name, metrics[f"eval/{name}/accuracy"])
    return metrics


def _evaluate_share(run: Run, leader: Leader, name: str) -> Tally:
    """This replica's part of the set: every ``data``-th prompt."""
    cfg, tally = run.config.eval, Tally()
    prompts, _ = leader.held_out[name].all(cfg.max_prompts)
    mine = prompts[run.layout.dp_rank :: run.layout.data]
    assert leader.client is not None
    assert leader.verifier is not None
    groups, _ = collect(
        mine,
        leader.client,
        group_size=cfg.samples,
        temperature=cfg.temperature,
        progress=run.layout.is_global_leader,
        desc=f"eval {name}",
    )
    graded = grade(
        groups,
        leader.verifier,
        run.config.grading.truncated_is_wrong,
        show_progress=run.layout.is_global_leader,
    )
    tally_groups(tally, [replace(group, tier=None) for group in graded])
    return tally
