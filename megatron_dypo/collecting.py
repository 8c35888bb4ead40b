"""Filling the queues: rounds of collection, or a stream of it in the background (``rollout.mode``). Called by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from megatron_dypo.batching.exchange import broadcast_object, gather_objects
from megatron_dypo.grading.verify import grade
from megatron_dypo.objective.route import Routed, route
from megatron_dypo.progress import Progress, progress
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.run import Leader, Run
from megatron_dypo.samples import SampleRow, sample_row
from megatron_dypo.scoring import score_early, scores_batch_by_batch
from megatron_dypo.serving import push, sample
from megatron_dypo.tally import tally_groups
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup, Treatment

_LOOK_EVERY_S = 0.2
"""How long a leader waits for its own groups before it asks the others how far they are."""
_SCORED_AT_ONCE = 1 / 4
"""Share of a rollout batch that is worth a forward pass of its own while the rest is sampled."""


def fill_queues(run: Run) -> None:
    """Collect, grade and route prompts until the queues hold a rollout batch, or ``max_collect_rounds`` are drawn."""
    leader, cfg, rows = run.leader, run.config.rollout, list[SampleRow]()
    if leader:
        run.tally.add("stale", leader.queues.drop_stale(run.step, run.config.batching.max_version_lag))
    streams = (cfg.mode == "async" or cfg.oversample > 1) and run.objective.needs_rollouts(run.step)
    rows += _fill_from_stream(run) if streams else _fill_in_rounds(run)
    if leader:
        leader.sample_log.write(run.step + 1, rows)


def _fill_in_rounds(run: Run) -> list[SampleRow]:
    batching, rows, rounds = run.config.batching, list[SampleRow](), 0
    while rounds < batching.max_collect_rounds and _count(run).waiting < batching.prompts_per_batch:
        groups = _collect(run, _next_prompts(run, run.leader) if run.leader else [])
        if run.leader:
            rows += _admit(run, run.leader, _graded(run, run.leader, groups))
        rounds += 1
    if run.leader:
        run.tally.extreme("max:rounds", rounds)
    return rows


def _fill_from_stream(run: Run) -> list[SampleRow]:
    """Take what the streams have finished until that is a rollout batch; with ``async`` they go on with the next one."""
    config, rows, seen = run.config, list[SampleRow](), 0
    batch = config.batching.prompts_per_batch
    limit = config.rollout.prompts_per_step * config.batching.max_collect_rounds
    stream = _stream(run, run.leader) if run.leader else None
    goes_on = config.rollout.mode == "async" and not _is_last_batch(run)
    # The next batch's groups are begun before this one is full: else its last ones would be sampled one after the other.
    enough = 2 * batch if goes_on else batch
    with progress(batch, "rollouts", "prompts to learn from", enabled=run.layout.is_global_leader) as bar:
        shown = 0
        while True:
            if run.leader and stream:
                graded = _taken(run, stream)
                rows += _admit(run, run.leader, graded)
                seen += len(graded)
            counts = _count(run, stream, seen)
            shown += _advance(bar, min(counts.waiting, batch) - shown)
            if counts.waiting >= batch or counts.seen >= limit:
                break
            if counts.unserved:
                push(run)
            if stream:
                stream.want(_share(run, enough - counts.waiting))
                stream.start()
            _score_or_wait(run, stream, counts)
    if stream and goes_on:
        stream.want(_share(run, max(0, enough - counts.waiting)))
    elif stream:
        stream.stop()
    return rows


def _score_or_wait(run: Run, stream: RolloutStream[GradedGroup] | None, counts: _Counts) -> None:
    """Make use of the wait for the rest of a batch: score what came in, once that is worth a forward pass."""
    batch = run.config.batching.prompts_per_batch
    missing = batch - counts.waiting
    if scores_batch_by_batch(run.config):
        missing = min(missing, math.ceil(_SCORED_AT_ONCE * batch) - counts.unscored)
    if missing <= 0:
        score_early(run)
    elif stream:
        with run.timings.measure("gen"):
            stream.wait(_LOOK_EVERY_S, _share(run, missing))


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
        client, verifier, rule = leader.background_client, leader.verifier, run.config.grading.truncated_is_wrong
        leader.background = RolloutStream(
            client,
            client.sampling(run.config.rollout.group_size),
            draw=lambda count: _draw(leader, count * run.layout.data, run.layout.dp_rank, run.layout.data),
            finish=lambda group: grade([group], verifier, rule, show_progress=False)[0],
            is_useful=lambda group: _is_useful(run, group),
            oversample=run.config.rollout.oversample,
        )
        leader.background.postpone(leader.unfinished)
        leader.unfinished = []
    return leader.background


def _taken(run: Run, stream: RolloutStream[GradedGroup]) -> list[GradedGroup]:
    graded, counts = stream.take()
    run.tally.add("retries", counts.retries)
    run.tally.add("incomplete_groups", counts.dropped_groups)
    run.tally.add("wrong_versions", counts.wrong_versions)
    return graded


def _is_useful(run: Run, group: GradedGroup) -> bool:
    """Whether a group will wait in a queue."""
    treatment = run.objective.treat(group.tier, run.step)
    return treatment is Treatment.REINFORCE or (treatment is Treatment.DISTIL and bool(group.prompt.traces))


def _next_prompts(run: Run, leader: Leader) -> list[Prompt]:
    """The next round of draws, after those that a resumed run had drawn and not finished."""
    unfinished, leader.unfinished = leader.unfinished, []
    count = run.config.rollout.prompts_per_step
    return [*unfinished, *_draw(leader, count, run.layout.dp_rank, run.layout.data)]


def _draw(leader: Leader, count: int, shard: int, num_shards: int) -> list[Prompt]:
    """This replica's share of the next ``count`` draws. A stream calls it in its own thread."""
    prompts, drops = leader.stream.take(leader.cursor, count, shard, num_shards)
    leader.cursor += count
    leader.drops.append(drops)
    return prompts


def _collect(run: Run, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
    """Groups of the prompts, without rollouts where the objective needs none. Collective over the world."""
    if not run.objective.needs_rollouts(run.step):
        return [RolloutGroup(prompt=prompt, rollouts=()) for prompt in prompts]
    return sample(run, prompts, "gen", group_size=run.config.rollout.group_size)


def _graded(run: Run, leader: Leader, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
    if not run.objective.needs_rollouts(run.step):
        return [GradedGroup(prompt=group.prompt, rollouts=(), verdicts=(), tier=None) for group in groups]
    with run.timings.measure("reward"):
        assert leader.verifier is not None
        return grade(
            groups,
            leader.verifier,
            run.config.grading.truncated_is_wrong,
            show_progress=run.layout.is_global_leader,
        )


def _admit(run: Run, leader: Leader, graded: Sequence[GradedGroup]) -> Iterator[SampleRow]:
    """Put what can be learnt from into the queues; yields the row of each prompt for people to read."""
    tally_groups(run.tally, graded)
    run.tally.extreme("max:epoch", max((group.prompt.visit for group in graded), default=0))
    while leader.drops:
        drops = leader.drops.popleft()
        run.tally.add("dropped_prompts", drops.prompts)
        run.tally.add("dropped_traces", drops.traces)
    routed = route(graded, run.objective, step=run.step, version=run.step, seed=run.config.run.seed)
    for samples in filter(None, routed.samples):
        leader.queues.put(samples)
    run.tally.add("hard_without_teacher", routed.without_teacher)
    for teacher, count in routed.teacher_counts().items():
        run.tally.add(f"teacher/{teacher}", count)
        run.tally.add("teachers", count)
    return _sample_rows(run.step + 1, graded, routed, leader)


def _sample_rows(step: int, graded: Sequence[GradedGroup], routed: Routed, leader: Leader) -> Iterator[SampleRow]:
    for group, treatment, teacher in zip(graded, routed.treatments, routed.teachers, strict=True):
        trace = None if teacher is None else leader.tokenizer.decode(group.prompt.traces[teacher].tolist())
        yield sample_row(step, group, treatment, teacher=teacher, trace=trace)


@dataclass(frozen=True)
class _Counts:
    """Of all replicas together."""

    waiting: int = 0
    """Groups in the queues."""
    unscored: int = 0
    """Those of them that have no log-probs yet."""
    seen: int = 0
    """Groups that came in since the filling began."""
    unserved: int = 0
    """Streams without a server."""

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def _count(run: Run, stream: RolloutStream[GradedGroup] | None = None, seen: int = 0) -> _Counts:
    """The same on every rank; ``stream`` and ``seen`` are the leader's own."""
    counts = _Counts()
    if run.leader:
        queues = run.leader.queues
        unscored = len({sample.order for sample in queues.unscored()})
        mine = _Counts(len(queues), unscored, seen, int(stream is not None and stream.is_unserved))
        counts = sum(gather_objects(mine, run.leader.group), counts)
    return broadcast_object(counts, run.layout.replica_group)
