"""From waiting groups to the token weights of one optimizer step. Called by all ranks.

A replica's leader holds the samples; its other ranks join for forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_dypo.batching.queues import Group, Queues, newest, oldest, order_of
from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.loop.books.tally import Tally, tally_sums
from megatron_dypo.loop.logprobs import Logprobs
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.objective.recipes.base import Objective, TraceBuffer
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import Sample, Totals


def open_batch(
    queues: Queues,
    logprobs: Logprobs,
    ranks: Ranks,
    batching: BatchingConfig,
    *,
    version: int,
    number: int = 0,
    buffer: TraceBuffer | None = None,
) -> RolloutBatch:
    """Take the oldest ``prompts_per_batch`` groups over all replicas out of the queues; return them with log-probs.

    Groups that stay in the queues get log-probs too, unless π_old must be the policy that begins their own batch.

    Args:
        version: of the policy's weights.
        number: of the rollout batch, from 0; of every ``old_logp.check_every``-th, the servers' log-probs are checked.
        buffer: of the objective; where enough traces are buffered, the newest are taken for the last minibatch.
    """
    orders = oldest(ranks.of_leaders(queues.orders()), batching.prompts_per_batch)
    is_check_due = logprobs.is_check_due(number)
    if logprobs.are_of_one_version:
        groups = logprobs.renew(queues.take(orders), version, checks_servers=is_check_due)
    else:
        queues.replace(logprobs.complete(queues.groups(), version, checks_servers=is_check_due))
        groups = queues.take(orders)
    batch = RolloutBatch(orders=tuple(orders), groups=tuple(groups), passes=batching.epochs_per_batch)
    if buffer is None:
        return batch
    own = newest(ranks.of_leaders([order_of(group) for group in queues.buffer]), buffer.size)
    return replace(batch, buffered_orders=tuple(own), buffered=tuple(queues.take_buffered(own, buffer.keeps)))


def count_totals(groups: Sequence[Group], ranks: Ranks) -> Totals:
    """Count the groups of a minibatch over all replicas."""
    return add_counts(ranks.of_leaders(count_groups(groups)))


def token_weights(
    groups: Sequence[Group], totals: Totals, objective: Objective, *, step: int, tally: Tally
) -> list[Sample]:
    """Return the samples of a minibatch, each with the objective's token weights."""
    weighted = []
    for group in groups:
        result = objective.weights_of(group, totals, step)
        weighted += [replace(s, weights=w) for s, w in zip(group, result.weights, strict=True)]
        tally_sums(tally, result.sums)
    return weighted
