"""Held-out accuracy through the rollout servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.grading.verify import grade
from megatron_dypo.run import Leader, Run
from megatron_dypo.serving import sample
from megatron_dypo.tally import Tally, tally_groups
from megatron_dypo.types import Prompt, RolloutGroup

log = logging.getLogger("megatron_dypo")


def evaluate(run: Run) -> dict[str, float]:
    """Accuracy of every evaluation set under the servers' current weights, split over the replicas. Collective.

    Returns:
        ``eval/<set>/…`` metrics on the leaders, {} elsewhere and when there is no set.
    """
    metrics: dict[str, float] = {}
    names = dict.fromkeys(Path(path).stem for path in run.config.eval.prompts)
    for name in names if run.bridge else ():
        groups = _sample_share(run, name)
        if run.leader is None:
            continue
        total = Tally()
        for tally in gather_objects(_graded(run, run.leader, groups), run.leader.group):
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


def _sample_share(run: Run, name: str) -> list[RolloutGroup]:
    """Rollouts of this replica's part of the set: every ``data``-th prompt."""
    cfg, mine = run.config.eval, list[Prompt]()
    if run.leader:
        prompts, _ = run.leader.held_out[name].all(cfg.max_prompts)
        mine = prompts[run.layout.dp_rank :: run.layout.data]
    return sample(run, mine, "eval", group_size=cfg.samples, temperature=cfg.temperature, desc=f"eval {name}")


def _graded(run: Run, leader: Leader, groups: Sequence[RolloutGroup]) -> Tally:
    assert leader.verifier is not None
    with run.timings.measure("eval"):
        graded = grade(
            groups,
            leader.verifier,
            run.config.grading.truncated_is_wrong,
            show_progress=run.layout.is_global_leader,
        )
    tally = Tally()
    tally_groups(tally, [replace(group, tier=None) for group in graded])
    return tally
