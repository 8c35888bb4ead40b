"""Filling the queues: rounds of collection, or a stream of it in the background (``rollout.mode``).

Leaders only do anything here; the other ranks of a replica pass through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.grading.verify import grade
from megatron_dypo.objective.route import Routed, route
from megatron_dypo.progress import progress
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.run import Leader, Run
from megatron_dypo.samples import SampleRow, sample_row
from megatron_dypo.tally import tally_groups
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup, Treatment

_LOOK_EVERY_S = 0.2
"""How long a leader waits for its own groups before it asks the others how far they are."""


def fill_queues(run: Run) -> None:
    """Collect, grade and route prompts until the queues hold a rollout batch, or ``max_collect_rounds`` are drawn."""
    leader = run.leader
    if leader is None:
        return
    batching, rows = run.config.batching, list[SampleRow]()
    run.tally.add("stale", leader.queues.drop_stale(run.step, batching.max_version_lag))
    if _streams(run):
        rows += _fill_from_stream(run, leader)
    else:
        rows += _fill_in_rounds(run, leader)
    leader.sample_log.write(run.step + 1, rows)


def _streams(run: Run) -> bool:
    cfg = run.config.rollout
    return (cfg.mode == "async" or cfg.oversample > 1) and run.objective.needs_rollouts(run.step)


def _fill_in_rounds(run: Run, leader: Leader) -> list[SampleRow]:
    batching, rows, rounds = run.config.batching, list[SampleRow](), 0
    while _waiting(leader) < batching.prompts_per_batch and rounds < batching.max_collect_rounds:
        rows += _admit(run, leader, _collect_and_grade(run, leader, _next_prompts(run, leader)))
        rounds += 1
    run.tally.extreme("max:rounds", rounds)
    return rows


def _fill_from_stream(run: Run, leader: Leader) -> list[SampleRow]:
    """Take what the stream has finished until that is a rollout batch; in ``async`` mode leave it at work on the next."""
    config, rows, seen = run.config, list[SampleRow](), 0
    batch, limit = config.batching.prompts_per_batch, config.rollout.prompts_per_step * config.batching.max_collect_rounds
    leader.background = leader.background or _make_stream(run, leader)
    stream, data = leader.background, run.layout.data
    with (
        run.timings.measure("gen"),
        progress(batch, "rollouts", "prompts to learn from", enabled=run.layout.is_global_leader) as bar,
    ):
        shown = 0
        while True:
            graded, counts = stream.take()
            run.tally.add("retries", counts.retries)
            run.tally.add("incomplete_groups", counts.dropped_groups)
            rows += _admit(run, leader, graded)
            seen += len(graded) + counts.dropped_groups
            waiting, all_seen = map(sum, zip(*gather_objects((len(leader.queues), seen), leader.group), strict=True))
            bar.update(min(waiting, batch) - shown)
            shown = min(waiting, batch)
            if waiting >= batch or all_seen >= limit:
                break
            stream.want(math.ceil((batch - waiting) / data))
            stream.start()
            stream.wait(_LOOK_EVERY_S)
    if config.rollout.mode == "sync" or _is_last_batch(run):
        stream.stop()
    else:
        stream.want(max(0, math.ceil((2 * batch - waiting) / data)))
    return rows


def _is_last_batch(run: Run) -> bool:
    """Whether the updates of this rollout batch are the run's last."""
    batching = run.config.batching
    return run.step + batching.updates_per_batch * batching.epochs_per_batch >= run.config.run.steps


def _make_stream(run: Run, leader: Leader) -> RolloutStream[GradedGroup]:
    assert leader.client is not None
    assert leader.verifier is not None
    verifier, rule = leader.verifier, run.config.grading.truncated_is_wrong
    client = leader.client.another()
    stream: RolloutStream[GradedGroup] = RolloutStream(
        client,
        client.sampling(run.config.rollout.group_size),
        draw=lambda count: _draw(run, leader, count),
        finish=lambda group: grade([group], verifier, rule, show_progress=False)[0],
        is_useful=lambda group: _is_useful(run, group),
        oversample=run.config.rollout.oversample,
    )
    stream.postpone(leader.unfinished)
    leader.unfinished = []
    return stream


def _is_useful(run: Run, group: GradedGroup) -> bool:
    """Whether a group will wait in a queue."""
    treatment = run.objective.treat(group.tier, run.step)
    return treatment is Treatment.REINFORCE or (treatment is Treatment.DISTIL and bool(group.prompt.traces))


def _draw(run: Run, leader: Leader, count: int) -> list[Prompt]:
    """The next ``count`` of this replica's share of the draws; called in the stream's thread."""
    prompts, drops = leader.stream.take(leader.cursor, count * run.layout.data, run.layout.dp_rank, run.layout.data)
    leader.cursor += count * run.layout.data
    leader.drops.append(drops)
    return prompts


def _next_prompts(run: Run, leader: Leader) -> list[Prompt]:
    """The next round of draws; first what a resumed run had drawn and not finished."""
    count, unfinished = run.config.rollout.prompts_per_step, leader.unfinished
    leader.unfinished = []
    prompts, drops = leader.stream.take(leader.cursor, count, run.layout.dp_rank, run.layout.data)
    leader.cursor += count
    leader.drops.append(drops)
    return [*unfinished, *prompts]


def _collect_and_grade(run: Run, leader: Leader, prompts: list[Prompt]) -> list[GradedGroup]:
    if not run.objective.needs_rollouts(run.step):
        return [GradedGroup(prompt=p, rollouts=(), verdicts=(), tier=None) for p in prompts]
    with run.timings.measure("gen"):
        assert leader.client is not None
        groups, stats = collect(
            prompts,
            leader.client,
            group_size=run.config.rollout.group_size,
            progress=run.layout.is_global_leader,
        )
    run.tally.add("retries", stats.retries)
    run.tally.add("incomplete_groups", stats.dropped_groups)
    with run.timings.measure("reward"):
        assert leader.verifier is not None
        return grade(
            groups,
            leader.verifier,
            run.config.grading.truncated_is_wrong,
            show_progress=run.layout.is_global_leader,
        )


def _admit(run: Run, leader: Leader, graded: Sequence[GradedGroup]) -> list[SampleRow]:
    """Put groups where they wait for an update, and count them; the rows of the sample log."""
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
    return list(_sample_rows(run.step + 1, graded, routed, leader))


def _sample_rows(step: int, graded: Sequence[GradedGroup], routed: Routed, leader: Leader) -> Iterator[SampleRow]:
    for group, treatment, teacher in zip(graded, routed.treatments, routed.teachers, strict=True):
        trace = None if teacher is None else leader.tokenizer.decode(group.prompt.traces[teacher].tolist())
        yield sample_row(step, group, treatment, teacher=teacher, trace=trace)


def _waiting(leader: Leader) -> int:
    return sum(gather_objects(len(leader.queues), leader.group))
