"""Collection: groups are sampled, graded and admitted until a rollout batch waits. Called by all ranks.

Groups come in rounds, or from a stream in the background (``rollout.mode``, ``rollout.oversample``). A collection ends
with something to learn from, or with the end of the run: see :mod:`megatron_dypo.loop.books.outcomes`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dypo.batching.queues import Queues
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.ending import RunEnded
from megatron_dypo.loop.books.accounts import ask_teacher, enter, enter_left_out
from megatron_dypo.loop.books.admission import Admitted, admit, tally_admitted
from megatron_dypo.loop.books.ledger import dropped_words
from megatron_dypo.loop.books.outcomes import (
    Outcomes,
    end_on_request,
    end_without_samples,
    end_without_teacher,
    end_without_verdicts,
)
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.loop.journal.rounds import sample_round
from megatron_dypo.loop.logprobs import Logprobs, without_logprobs
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.loop.teacher import NoTeacher, Teacher
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.processes.stop_requests import STOP, StopFlag
from megatron_dypo.processes.watchdog import mark
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.types import DropReason, GradedGroup

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class Collector:
    """The parts of a run that a collection uses."""

    replica: Replica
    servers: Servers | NoServers
    objective: Objective
    logprobs: Logprobs
    """Computes log-probs while a stream still samples."""
    ranks: Ranks
    rollout: RolloutConfig
    batching: BatchingConfig
    max_version_lag: int
    """Versions that a waiting group's oldest rollout may be behind."""
    fail_truncated: bool
    """Do not verify rollouts that hit the length limit; see ``GradingConfig``."""
    max_prompt_tokens: int
    seed: int
    total_steps: int
    tally: Tally
    timings: Timings
    teacher: Teacher | NoTeacher = field(default_factory=NoTeacher)
    journal: Journal | NoJournal = field(default_factory=NoJournal)
    stop: StopFlag = STOP
    """Ends a collection when it is set. Unfinished prompts are then in flight for the run that resumes."""

    @property
    def max_prompts(self) -> int:
        """Number of draws after which a collection ends, if it has found anything to learn from."""
        return self.rollout.prompts_per_round * self.batching.max_collect_rounds

    def uses_stream(self, step: int) -> bool:
        """Return whether the collection of ``step`` takes its groups from the background stream."""
        return self.rollout.uses_stream and self.objective.needs_rollouts(step)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The progress of a collection over all replicas; the same on every rank."""

    waiting: int = 0
    """Groups in the queues."""
    without_logprobs: int = 0
    """Groups in the queues that have no log-probs yet."""
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
            without_logprobs=self.without_logprobs + other.without_logprobs,
            unserved=self.unserved + other.unserved,
            outcomes=self.outcomes + other.outcomes,
            num_prompts=max(self.num_prompts, other.num_prompts),
            failure=self.failure or other.failure,
        )


def collect_in_rounds(collector: Collector, step: int) -> Queues:
    """Draw, sample, grade and admit prompts in rounds until a rollout batch waits; return this replica's queues.

    There are at most ``max_collect_rounds`` rounds. If they find nothing to learn from, collection goes on until every
    prompt was looked at once.

    Raises:
        RunEnded: on all ranks: nothing is left to learn from, no group comes back whole, no verdict is given, no
            server is left, every prompt is too long, or the run was asked to stop. The samples of the collection are
            written in any case.
    """
    replica, batching, rounds = collector.replica, collector.batching, 0
    begin_collection(collector, step)
    admitted, look = list[Admitted](), look_around(collector)
    try:
        while look.waiting < batching.prompts_per_batch and (
            rounds < batching.max_collect_rounds or looks_further(collector, look, step)
        ):
            mark("collecting rollouts")
            prompts = replica.begin_round(collector.rollout.prompts_per_round)
            if collector.objective.needs_rollouts(step):
                graded, dropped = sample_round(collector, prompts, step)
            else:
                graded = [GradedGroup(prompt=prompt, rollouts=(), verdicts=(), tier=None) for prompt in prompts]
                dropped = ()
            admitted.append(admit_groups(collector, step, graded, dropped))
            replica.end_round()
            rounds += 1
            before, look = look, look_around(collector)
            end_if(end_without_verdicts(look.outcomes, before.outcomes, at_least=1))
            end_if(end_without_teacher(look.outcomes, before.outcomes, at_least=1))
    finally:
        replica.write_samples(step + 1, admitted)
    collector.tally.extreme("max:rounds", rounds)
    warn_of_losses(collector, look, step)
    return replica.queues


def begin_collection(collector: Collector, step: int) -> None:
    """Drop groups that have waited for too long, and begin to count."""
    replica = collector.replica
    stale = replica.queues.drop_stale(step, collector.max_version_lag)
    collector.tally.add("stale", stale)
    replica.books.drop(DropReason.STALE, stale)
    replica.books.outcomes = Outcomes()
    # A checkpoint may hold groups for which the teacher was not asked yet.
    ask_teacher(replica, collector.teacher, collector.tally, collector.timings)


def admit_groups(
    collector: Collector, step: int, graded: Sequence[GradedGroup], dropped: Sequence[DroppedGroup]
) -> Admitted:
    """Put new groups into the queues or the books; return what happened to each."""
    admitted = admit(
        graded,
        dropped,
        collector.objective,
        step=step,
        seed=collector.seed,
        max_version_lag=collector.max_version_lag,
    )
    tally_admitted(collector.tally, graded, admitted)
    collector.tally.add("from_journal", collector.journal.count_reused())
    enter_left_out(collector.replica, collector.tally)
    enter(collector.replica, graded, admitted, fail_truncated=collector.fail_truncated)
    ask_teacher(collector.replica, collector.teacher, collector.tally, collector.timings)
    return admitted


def look_around(collector: Collector, failure: RunEnded | None = None) -> Look:
    """Gather the progress of all leaders; ``failure`` is this replica's own. Collective over the world.

    Raises:
        RunEnded: on all ranks, if one leader has a ``failure``.
    """
    replica = collector.replica
    enter_left_out(replica, collector.tally)
    mine = Look(
        waiting=len(replica.queues),
        without_logprobs=len({sample.order for sample in without_logprobs(replica.queues.groups())}),
        unserved=int(collector.servers.stream.is_unserved),
        outcomes=Outcomes() + replica.books.outcomes,
        num_prompts=replica.num_prompts,
        failure=failure or (end_on_request() if collector.stop.is_set() else None),
    )
    look = sum(collector.ranks.of_leaders(mine), Look())
    end_if(look.failure)
    return look


def looks_further(collector: Collector, look: Look, step: int) -> bool:
    """Return whether a collection at its limit goes on: if it has found nothing and not looked at every prompt.

    Raises:
        RunEnded: it has found nothing, and there are no further prompts.
    """
    if look.waiting:
        return False
    end_if(
        end_without_samples(
            look.outcomes,
            num_prompts=look.num_prompts,
            step=step,
            max_prompt_tokens=collector.max_prompt_tokens,
        )
    )
    if collector.ranks.is_global_leader:
        words = ", ".join(dropped_words(look.outcomes.dropped))
        warn_often(log, "step %d: no trainable prompt among %d draws so far: %s", step, look.outcomes.seen, words)
    return True


def end_if(end: RunEnded | None) -> None:
    """Raise ``end``, if there is one."""
    if end is not None:
        raise end


def warn_of_losses(collector: Collector, look: Look, step: int) -> None:
    """Warn if many prompts were lost for reasons other than their difficulty, or if a batch stays short."""
    if not collector.ranks.is_global_leader:
        return
    outcomes, words = look.outcomes, ", ".join(dropped_words(look.outcomes.dropped))
    failed = outcomes.seen - outcomes.graded
    if failed * 4 > outcomes.seen:
        reason = f"; the last reason: {outcomes.last_reason}" if outcomes.last_reason else ""
        warn_often(log, "step %d: %d of %d prompts could not be used: %s%s", step, failed, outcomes.seen, words, reason)
    if look.waiting < collector.batching.prompts_per_batch:
        warn_often(
            log,
            "step %d: %d of %d prompts to learn from after %d draws, the limit of batching.max_collect_rounds=%d: %s",
            step,
            look.waiting,
            collector.batching.prompts_per_batch,
            outcomes.seen,
            collector.batching.max_collect_rounds,
            words or "none dropped",
        )
