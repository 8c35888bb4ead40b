"""What a training step does once the queues are filled, in the order of :func:`megatron_dypo.loop.train.train_step`.

A replica's leader holds the queues; its other ranks join for forward and backward passes. Every function here is called
by all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dypo.batching.exchange import balance, broadcast_samples
from megatron_dypo.batching.pack import (
    num_microbatches,
    padded_lengths,
    plan_microbatches,
    sequence_alignment,
)
from megatron_dypo.batching.queues import is_used_up, oldest
from megatron_dypo.batching.zigzag import shard
from megatron_dypo.loop.run import Run
from megatron_dypo.loop.tally import tally_sums, tally_update, tally_work
from megatron_dypo.mcore.forward_step import add_over_ranks, loss_pass
from megatron_dypo.mcore.logprobs import largest_count, pack_microbatches, round_up_microbatches
from megatron_dypo.mcore.moe_router import balance_metrics
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.parallel.collectives import broadcast_object, gather_objects
from megatron_dypo.types import Microbatch, Sample, Totals

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What enters one update: whole groups on the leader that holds them, counts everywhere."""

    groups: list[list[Sample]]
    """Empty off the leaders."""
    totals: Totals
    is_last: bool
    """Nothing of the rollout batch is left for another update."""


def open_batch(run: Run) -> None:
    """Make the oldest of what waits the rollout batch of the next updates."""
    if run.leader:
        queues, batching = run.leader.queues, run.config.batching
        orders = gather_objects([g[0].order for g in queues.groups()], run.leader.group)
        queues.open_batch(oldest(orders, batching.prompts_per_batch), epochs=batching.epochs_per_batch)


def take_batch(run: Run) -> Batch:
    """The next mini-batch of the rollout batch."""
    groups, counted = [], None
    if run.leader:
        leaders, queues = run.leader.group, run.leader.queues
        groups = queues.draw(oldest(gather_objects(queues.turns(), leaders), run.config.batching.prompts_per_update))
        for group in groups:
            if not group[0].updates_left:
                run.leader.ledger.train(group[0].treatment)
        counts = gather_objects((count_groups(groups), len(queues.batch)), leaders)
        counted = add_counts(of_kind for of_kind, _ in counts), is_used_up(left for _, left in counts)
        for treatment, queue in queues.waiting.items():
            run.tally.add(f"queue/{treatment.value}", len(queue))
    shared = broadcast_object(counted, run.layout.replica_group)
    assert shared is not None, "the leader counts"
    totals, is_last = shared
    assert totals.num_prompts, "a collection ends with something to learn from, or ends the run"
    return Batch(groups=groups, totals=totals, is_last=is_last)


def weigh(run: Run, batch: Batch) -> list[Sample]:
    """Give every sample of the batch its token weights; on the leaders, [] elsewhere."""
    weighed = []
    for group in batch.groups:
        result = run.objective.token_weights(group, batch.totals, run.step)
        weighed += [replace(s, weights=w) for s, w in zip(group, result.weights, strict=True)]
        tally_sums(run.tally, result.sums)
    tally_update(run.tally, weighed, run.step, old_is_rollout=run.config.score.policy == "rollout")
    return weighed


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateReport:
    """What one update did, the same on every rank."""

    is_applied: bool
    """False: the gradients were not finite, and the weights stay as they were."""
    sums: dict[str, float]
    """The sums of the loss over all ranks, by name."""
    metrics: dict[str, float]
    """Of the optimizer and of packing."""
    samples: Sequence[Sample]
    """Those of this replica."""


def update(run: Run, weighed: Sequence[Sample]) -> UpdateReport:
    """Spread the samples over replicas, pack, one forward-backward over all of them, one optimizer step."""
    cost = sequence_cost(run.arch, run.config.model.recompute)
    samples = balance(weighed, run.leader.group, cost.of) if run.leader else None
    samples = broadcast_samples(samples, run.layout.replica_group)
    costs = [cost.of(sample) for sample in samples]
    tally_work(run.tally, sum(costs))
    rows, layout = _pack(run, samples, costs), run.layout
    parts = [shard(row, layout.cp_rank, layout.context) for row in rows]
    with run.timings.measure("update_actor"):
        run.optimizer.zero_grad()
        with progress(len(rows), "update", "microbatches", enabled=layout.is_global_leader) as bar:
            sums = loss_pass(run.chunks, parts, objective=run.objective, context_group=layout.cp_group, bar=bar)
        applied = run.optimizer.step()
    padding = sum(int((row.sample_T < 0).sum()) for row in rows) / sum(len(row.sample_T) for row in rows)
    metrics = {
        "train/grad_norm": applied.grad_norm,
        "train/lr": applied.lr,
        "train/skipped": float(not applied.ok),
        "train/num_microbatches": len(rows),
        "train/padding_ratio": padding,
        **balance_metrics(run.chunks),
    }
    return UpdateReport(is_applied=applied.ok, sums=add_over_ranks(sums, layout), metrics=metrics, samples=samples)


def _pack(run: Run, samples: Sequence[Sample], costs: Sequence[float]) -> list[Microbatch]:
    """Rows of about equal work, as many on every replica; each as long as what it holds, but for the alignment."""
    layout, batching = run.layout, run.config.batching
    budget = batching.tokens_per_microbatch
    lengths = padded_lengths(samples, sequence_alignment(layout.context))
    count = round_up_microbatches(largest_count(num_microbatches(lengths, budget=budget, costs=costs)), layout)
    bins = plan_microbatches(lengths, budget=budget, count=count, costs=costs)
    return pack_microbatches(
        samples, bins, layout, token_multiple=run.config.row_multiple, streams=run.objective.streams
    )
