"""Filling the queues: rounds of collection, or a stream of it in the background (``rollout.mode``). Called by all ranks.

A collection ends with something to learn from, or with the end of the run: see :mod:`megatron_dypo.loop.outcomes`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dypo.batching.exchange import broadcast_object, gather_objects
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.grading.verify import grade
from megatron_dypo.loop.admission import admit, count_long_prompts
from megatron_dypo.loop.ledger import dropped_words
from megatron_dypo.loop.logprobs import score_early, scores_batch_by_batch
from megatron_dypo.loop.outcomes import Outcomes, end_without_samples, end_without_verdicts
from megatron_dypo.loop.run import Leader, Run
from megatron_dypo.loop.servers import Sampled, push, sample
from megatron_dypo.loop.tally import tally_client
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.progress import Progress, progress
from megatron_dypo.metrics.samples import SampleRow
from megatron_dypo.processes.watchdog import mark
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.types import DropReason, GradedGroup, Prompt, Treatment

log = logging.getLogger("megatron_dypo")

_LOOK_EVERY_S = 0.2
"""How long a leader waits for its own groups before it asks the others how far they are."""
_SCORED_AT_ONCE = 1 / 4
"""Share of a rollout batch that is worth a forward pass of its own while the rest is sampled."""


def fill_queues(run: Run) -> None:
    """Collect, grade and route prompts until the queues hold a rollout batch, or ``max_collect_rounds`` are drawn.

    While nothing at all is found to learn from, collection goes on until every prompt was looked at once.

    Raises:
        RunEnded: on all ranks: nothing is left to learn from, no group comes back whole, no verdict is given, no
            server is left, or every prompt is too long. The samples of the collection are written all the same.
    """
    leader, cfg, rows = run.leader, run.config.rollout, list[SampleRow]()
    if leader:
        stale = leader.queues.drop_stale(run.step, run.config.batching.max_version_lag)
        run.tally.add("stale", stale)
        leader.ledger.drop(DropReason.STALE, stale)
        leader.outcomes = Outcomes()
    streams = (cfg.mode == "async" or cfg.oversample > 1) and run.objective.needs_rollouts(run.step)
    try:
        _fill_from_stream(run, rows) if streams else _fill_in_rounds(run, rows)
    finally:
        if leader:
            leader.sample_log.write(run.step + 1, rows)


def _fill_in_rounds(run: Run, rows: list[SampleRow]) -> None:
    batching, rounds = run.config.batching, 0
    look = _look(run)
    while look.waiting < batching.prompts_per_batch and (
        rounds < batching.max_collect_rounds or _looks_further(run, look)
    ):
        mark("collecting rollouts")
        before = look.outcomes
        sampled = _collect(run, _next_prompts(run, run.leader) if run.leader else [])
        if run.leader:
            rows += admit(run, run.leader, _graded(run, run.leader, sampled), sampled.dropped)
            run.leader.unfinished = []
        rounds += 1
        look = _look(run)
        _end_if(end_without_verdicts(look.outcomes, before, at_least=1))
    if run.leader:
        run.tally.extreme("max:rounds", rounds)
    _warn_of_losses(run, look.outcomes)
    _warn_of_a_short_batch(run, look)


def _fill_from_stream(run: Run, rows: list[SampleRow]) -> None:
    """Take what the streams have finished until that is a rollout batch; with ``async`` they go on with the next one."""
    config, batch = run.config, run.config.batching.prompts_per_batch
    limit = _limit(run)
    stream = _stream(run, run.leader) if run.leader else None
    goes_on = config.rollout.mode == "async" and not _is_last_batch(run)
    # The next batch's groups are begun before this one is full: else its last ones would be sampled one after the other.
    enough = 2 * batch if goes_on else batch
    judged = Outcomes()
    with progress(batch, "rollouts", "prompts to learn from", enabled=run.layout.is_global_leader) as bar:
        shown = 0
        while True:
            mark("collecting rollouts")
            failure = _take(run, run.leader, stream, rows) if run.leader and stream else None
            look = _look(run, stream, failure)
            shown += _advance(bar, min(look.waiting, batch) - shown)
            if look.waiting >= batch:
                break
            if look.outcomes.seen >= limit and not _looks_further(run, look):
                break
            judged = look.outcomes if look.outcomes.verdicts > judged.verdicts else judged
            _end_if(end_without_verdicts(look.outcomes, judged, at_least=config.rollout.prompts_per_round))
            if look.unserved:
                push(run)
            if stream:
                stream.want(_share(run, enough - look.waiting))
                stream.start()
            _score_or_wait(run, stream, look)
    _warn_of_losses(run, look.outcomes)
    _warn_of_a_short_batch(run, look)
    if stream and goes_on:
        stream.want(_share(run, max(0, enough - look.waiting)))
    elif stream:
        stream.stop()


def _looks_further(run: Run, look: Look) -> bool:
    """Whether a collection at its limit goes on: it has found nothing yet, and has not looked at every prompt.

    Raises:
        RunEnded: there is nothing to look further for.
    """
    if look.waiting:
        return False
    _end_if(
        end_without_samples(
            look.outcomes,
            num_prompts=look.num_prompts,
            step=run.step,
            max_prompt_tokens=run.config.data.max_prompt_tokens,
        )
    )
    if run.layout.is_global_leader:
        words = ", ".join(dropped_words(look.outcomes.dropped))
        warn_often(log, "step %d: no trainable prompt among %d draws so far: %s", run.step, look.outcomes.seen, words)
    return True


def _end_if(end: RunEnded | None) -> None:
    if end is not None:
        raise end


def _warn_of_losses(run: Run, outcomes: Outcomes) -> None:
    """Say loudly when much of what was collected came to nothing for other reasons than its difficulty."""
    failed = outcomes.seen - outcomes.graded
    if run.layout.is_global_leader and failed * 4 > outcomes.seen:
        words = ", ".join(dropped_words(outcomes.dropped))
        reason = f"; the last reason: {outcomes.last_reason}" if outcomes.last_reason else ""
        warn_often(
            log, "step %d: %d of %d prompts could not be used: %s%s", run.step, failed, outcomes.seen, words, reason
        )


def _warn_of_a_short_batch(run: Run, look: Look) -> None:
    """Say when a step trains on fewer prompts than the config asks for, and why."""
    batch = run.config.batching.prompts_per_batch
    if run.layout.is_global_leader and look.waiting < batch:
        words = ", ".join(dropped_words(look.outcomes.dropped)) or "none dropped"
        warn_often(
            log,
            "step %d: %d of %d prompts to learn from after %d draws, the limit of batching.max_collect_rounds=%d: %s",
            run.step,
            look.waiting,
            batch,
            look.outcomes.seen,
            run.config.batching.max_collect_rounds,
            words,
        )


def _score_or_wait(run: Run, stream: RolloutStream[GradedGroup] | None, look: Look) -> None:
    """Make use of the wait for the rest of a batch: score what came in, once that is worth a forward pass."""
    batch = run.config.batching.prompts_per_batch
    missing = batch - look.waiting
    if scores_batch_by_batch(run.config):
        missing = min(missing, math.ceil(_SCORED_AT_ONCE * batch) - look.unscored)
    if missing <= 0:
        score_early(run)
    elif stream:
        # An end that the stream met is told to all ranks at the next look.
        with run.timings.measure("gen"), contextlib.suppress(ServerDiedError):
            stream.wait(_LOOK_EVERY_S, _share(run, missing), resolved=_share(run, _limit(run)))


def _limit(run: Run) -> int:
    """Prompts after which a collection makes do with what it has found."""
    return run.config.rollout.prompts_per_round * run.config.batching.max_collect_rounds


def _share(run: Run, count: int) -> int:
    """A replica's part of so many groups."""
    return math.ceil(count / run.layout.data)


def _advance(bar: Progress, count: int) -> int:
    bar.update(count)
    return count


def _is_last_batch(run: Run) -> bool:
    """Whether the updates of this rollout batch are the run's last."""
    batching = run.config.batching
    return run.step + batching.updates_per_batch * batching.epochs_per_batch >= run.config.run.steps


def _stream(run: Run, leader: Leader) -> RolloutStream[GradedGroup]:
    """The replica's stream, made on first use."""
    if leader.background is None:
        assert leader.background_client is not None
        assert leader.verifier is not None
        client, verifier, rule = leader.background_client, leader.verifier, run.config.grading.fail_truncated
        cfg, batch = run.config.rollout, run.config.batching.prompts_per_batch
        leader.background = RolloutStream(
            client,
            client.sampling(cfg.group_size),
            draw=lambda count: _draw(leader, count * run.layout.data, run.layout.dp_rank, run.layout.data),
            finish=lambda group: grade([group], verifier, rule, show_progress=False)[0],
            is_useful=lambda group: _is_useful(run, group),
            oversample=cfg.oversample,
            max_unread=_share(run, max(_limit(run), math.ceil(2 * cfg.oversample * batch))),
        )
        leader.background.postpone(leader.unfinished)
        leader.unfinished = []
    return leader.background


def _take(run: Run, leader: Leader, stream: RolloutStream[GradedGroup], rows: list[SampleRow]) -> RunEnded | None:
    """Admit what the stream has finished; the end of the run, if the stream has failed for one."""
    graded, counts = stream.take()
    tally_client(run.tally, counts.client)
    rows += admit(run, leader, graded, counts.dropped)
    error = stream.error
    if isinstance(error, ServerDiedError):
        return RunEnded(Cause.SERVERS_GONE, str(error))
    if error is not None:
        raise error
    return None


def _is_useful(run: Run, group: GradedGroup) -> bool:
    """Whether a group will wait in a queue."""
    if group.tier is None:
        return False
    treatment = run.objective.treat(group.tier, run.step)
    return treatment is Treatment.REINFORCE or (treatment is Treatment.DISTIL and bool(group.prompt.traces))


def _next_prompts(run: Run, leader: Leader) -> list[Prompt]:
    """The next round of draws, after those that a resumed run had drawn and not finished.

    They count as unfinished until they are graded, so that an end of the run in between loses none.
    """
    count = run.config.rollout.prompts_per_round
    leader.unfinished = [*leader.unfinished, *_draw(leader, count, run.layout.dp_rank, run.layout.data)]
    return leader.unfinished


def _draw(leader: Leader, count: int, shard: int, num_shards: int) -> list[Prompt]:
    """This replica's share of the next ``count`` draws. A stream calls it in its own thread, under its lock."""
    start = leader.cursor
    prompts, drops = leader.stream.take(start, count, shard, num_shards)
    leader.cursor += count
    leader.ledger.draw(len(range(start + (shard - start) % num_shards, start + count, num_shards)))
    leader.drops.append(drops)
    return prompts


def _collect(run: Run, prompts: Sequence[Prompt]) -> Sampled:
    """Groups of the prompts, without rollouts where the objective needs none. Collective over the world."""
    if not run.objective.needs_rollouts(run.step):
        return Sampled.without_rollouts(prompts)
    return sample(run, prompts, "gen", group_size=run.config.rollout.group_size)


def _graded(run: Run, leader: Leader, sampled: Sampled) -> list[GradedGroup]:
    groups = sampled.groups
    if not run.objective.needs_rollouts(run.step):
        return [GradedGroup(prompt=group.prompt, rollouts=(), verdicts=(), tier=None) for group in groups]
    with run.timings.measure("reward"):
        assert leader.verifier is not None
        return grade(
            groups,
            leader.verifier,
            run.config.grading.fail_truncated,
            show_progress=run.layout.is_global_leader,
        )


@dataclass(frozen=True, kw_only=True)
class Look:
    """How far a collection is, over all replicas; the same on every rank."""

    waiting: int = 0
    """Groups in the queues."""
    unscored: int = 0
    """Those of them that have no log-probs yet."""
    unserved: int = 0
    """Streams without a server."""
    outcomes: Outcomes = field(default_factory=Outcomes)
    num_prompts: int = 0
    """Rows of the data."""
    failure: RunEnded | None = None
    """Why a replica cannot go on."""

    def __add__(self, other: Look) -> Look:
        return Look(
            waiting=self.waiting + other.waiting,
            unscored=self.unscored + other.unscored,
            unserved=self.unserved + other.unserved,
            outcomes=self.outcomes + other.outcomes,
            num_prompts=max(self.num_prompts, other.num_prompts),
            failure=self.failure or other.failure,
        )


def _look(run: Run, stream: RolloutStream[GradedGroup] | None = None, failure: RunEnded | None = None) -> Look:
    """Ask all leaders how far they are; ``stream`` and ``failure`` are the leader's own. Collective over the world.

    Raises:
        RunEnded: on all ranks, where one leader has a ``failure``.
    """
    look = Look()
    if run.leader:
        leader = run.leader
        count_long_prompts(run, leader)
        mine = Look(
            waiting=len(leader.queues),
            unscored=len({sample.order for sample in leader.queues.unscored()}),
            unserved=int(stream is not None and stream.is_unserved),
            outcomes=leader.outcomes,
            num_prompts=len(leader.stream),
            failure=failure,
        )
        look = sum(gather_objects(mine, leader.group), look)
    look = broadcast_object(look, run.layout.replica_group)
    _end_if(look.failure)
    return look
