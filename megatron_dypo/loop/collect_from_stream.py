"""Collection from the background: a thread of each leader samples and grades while the trainer does something else."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math

from megatron_dypo.batching.queues import Queues
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.admission import Admitted
from megatron_dypo.loop.books.outcomes import Outcomes, end_without_teacher, end_without_verdicts
from megatron_dypo.loop.books.tally import tally_client
from megatron_dypo.loop.collect import (
    Collector,
    Look,
    admit_groups,
    begin_collection,
    end_if,
    look_around,
    looks_further,
    warn_of_losses,
)
from megatron_dypo.loop.journal.repeat import repeat_collection
from megatron_dypo.loop.ranks import own_part
from megatron_dypo.metrics.progress import progress
from megatron_dypo.processes.watchdog import mark
from megatron_dypo.rollout.server.process import ServerDiedError

_LOOK_EVERY_S = 0.2
"""Longest wait of a leader for its own groups before it asks the other leaders for their progress."""
_EARLY_SHARE = 1 / 4
"""Share of a rollout batch that is worth a separate forward pass while the rest is sampled."""


def collect_from_stream(collector: Collector, step: int) -> Queues:
    """Take finished groups from the streams until a rollout batch waits; return this replica's queues.

    In asynchronous mode the streams go on with the next batch.

    Raises:
        RunEnded: as for :func:`megatron_dypo.loop.collect.collect_in_rounds`.
    """
    stream, batch = collector.servers.stream, collector.batching.prompts_per_batch
    begin_collection(collector, step)
    goes_on = collector.rollout.mode == "async" and not _is_last_batch(collector, step)
    # Groups of the next batch start before this one is full. Otherwise the last groups would be sampled one by one.
    target = 2 * batch if goes_on else batch
    admitted = list[Admitted]()
    try:
        repeated = repeat_collection(collector, step, admitted)
        if repeated.is_over and look_around(collector).waiting >= (1 if repeated.looks else batch):
            return collector.replica.queues
        if unfinished := collector.replica.unfinished():
            stream.postpone(unfinished)
            collector.replica.end_round()
        look = _fill(collector, step, target, admitted, repeated.looks)
        collector.journal.complete(step)
    finally:
        collector.replica.write_samples(step + 1, admitted)
    warn_of_losses(collector, look, step)
    if goes_on:
        stream.want(own_part(max(0, target - look.waiting), collector.ranks))
        stream.start()
        gc.collect()  # the stream keeps the collector from old objects until it stops
    else:
        stream.stop()
    return collector.replica.queues


def _fill(collector: Collector, step: int, target: int, admitted: list[Admitted], looks: int) -> Look:
    """Admit groups until a rollout batch waits, or the limit is reached, while the streams sample up to ``target``.

    Args:
        looks: number of looks of this collection that were repeated before.
    """
    stream, ranks, batch = collector.servers.stream, collector.ranks, collector.batching.prompts_per_batch
    judged, taught, shown = Outcomes(), Outcomes(), 0
    with progress(batch, "rollouts", "prompts to learn from", enabled=ranks.is_global_leader) as bar:
        for number in itertools.count(looks):
            mark("collecting rollouts")
            look = look_around(collector, _admit_finished(collector, step, number, admitted))
            bar.update(min(look.waiting, batch) - shown)
            shown = min(look.waiting, batch)
            is_at_limit = look.outcomes.seen >= collector.max_prompts
            if look.waiting >= batch or (is_at_limit and not looks_further(collector, look, step)):
                return look
            judged = look.outcomes if look.outcomes.verdicts > judged.verdicts else judged
            end_if(end_without_verdicts(look.outcomes, judged, at_least=collector.rollout.prompts_per_round))
            taught = look.outcomes if look.outcomes.teacher_answers > taught.teacher_answers else taught
            end_if(end_without_teacher(look.outcomes, taught, at_least=collector.rollout.prompts_per_round))
            if look.unserved:
                collector.servers.refit(step)
            stream.want(own_part(target - look.waiting, ranks))
            stream.start()
            if _use_the_wait(collector, step, look):
                collector.journal.compute_logprobs(step, number)
        raise AssertionError("counting has no end")


def _admit_finished(collector: Collector, step: int, number: int, admitted: list[Admitted]) -> RunEnded | None:
    """Admit the finished groups of the stream; return the end of the run, if the stream has failed."""
    stream = collector.servers.stream
    graded, counts = stream.take()
    collector.journal.take(step, number, [group.prompt.order for group in graded])
    tally_client(collector.tally, counts.client)
    collector.replica.leave_out(counts.left_out)
    admitted.append(admit_groups(collector, step, graded, counts.dropped))
    if isinstance(stream.error, ServerDiedError):
        return RunEnded(Cause.SERVERS_GONE, str(stream.error))
    if stream.error is not None:
        raise stream.error
    return None


def _use_the_wait(collector: Collector, step: int, look: Look) -> bool:
    """Compute log-probs of new groups if they are worth a forward pass, and return True; else wait for more groups."""
    batch, ranks = collector.batching.prompts_per_batch, collector.ranks
    missing = batch - look.waiting
    if collector.logprobs.are_of_one_version:
        missing = min(missing, math.ceil(_EARLY_SHARE * batch) - look.without_logprobs)
    if missing <= 0:
        # The weights will not change until the batch is full.
        queues = collector.replica.queues
        queues.replace(collector.logprobs.complete(queues.groups(), step))
        return True
    # If the stream has failed, all ranks learn of it at the next look.
    with collector.timings.measure("gen"), contextlib.suppress(ServerDiedError):
        collector.servers.stream.wait(
            _LOOK_EVERY_S, own_part(missing, ranks), resolved=own_part(collector.max_prompts, ranks)
        )
    return False


def _is_last_batch(collector: Collector, step: int) -> bool:
    """Return whether the updates of this rollout batch are the run's last."""
    batching = collector.batching
    return step + batching.updates_per_batch * batching.epochs_per_batch >= collector.total_steps
