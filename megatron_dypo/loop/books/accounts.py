"""Entries into a replica's books, and the balance of all replicas."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.batching.rollout_batch import Minibatch, RolloutBatch
from megatron_dypo.loop.books.admission import Admitted
from megatron_dypo.loop.books.ledger import Balance, Ledger, OpenDraws, balance
from megatron_dypo.loop.books.outcomes import count_verdicts
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.requests import Stream
from megatron_dypo.loop.teacher import NoTeacher, Teacher
from megatron_dypo.metrics import status
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.types import DropReason, GradedGroup

log = logging.getLogger("megatron_dypo")


def enter(replica: Replica, graded: Sequence[GradedGroup], admitted: Admitted, *, fail_truncated: bool) -> None:
    """Put what can be learned from into the queues, and the rest into the books."""
    for samples in filter(None, (*admitted.routed.samples, *admitted.routed.buffered)):
        replica.queues.put(samples)
    for reason, message in admitted.drops():
        replica.books.drop(reason, message=message)
    outcomes = replica.books.outcomes
    outcomes.graded += len(admitted.usable)
    outcomes.verdicts += count_verdicts(graded, fail_truncated)


def ask_teacher(replica: Replica, teacher: Teacher | NoTeacher, tally: Tally, timings: Timings) -> None:
    """Add the teacher's log-probs to the waiting groups, if the objective reads them; drop and count groups without."""
    if not teacher.missing(replica.queues):
        return
    with timings.measure("teacher_log_prob"):
        report = teacher.complete(replica.queues)
    for message in report.dropped:
        replica.books.drop(DropReason.NO_TEACHER_LOGP, message=message)
    replica.books.outcomes.teacher_answers += report.answered
    tally.add("teacher_asked", report.asked)
    tally.add("without_teacher_logp", len(report.dropped))


def enter_left_out(replica: Replica, tally: Tally) -> None:
    """Enter prompts and traces that draws left out for their length into the books."""
    left_out = replica.take_left_out()
    replica.books.drop(DropReason.TOO_LONG, left_out.prompts)
    tally.add("dropped_prompts", left_out.prompts)
    tally.add("dropped_traces", left_out.traces)
    tally.add("wrong_traces", left_out.wrong_traces)


def enter_minibatch(replica: Replica, minibatch: Minibatch, tally: Tally) -> None:
    """Enter groups whose last update this is into the books, and count the groups that go on waiting."""
    for group in minibatch.finished:
        replica.books.ledger.train(group[0].treatment)
    for treatment, queue in replica.queues.waiting.items():
        tally.add(f"queue/{treatment.value}", len(queue))
    tally.add("queue/buffer", len(replica.queues.buffer))


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """The books and counts of all replicas together."""

    replica: Replica
    stream: Stream
    ranks: Ranks
    tally: Tally

    def balance(self, batch: RolloutBatch) -> Balance:
        """Compare the books with the groups that wait (``batch`` included) or are in flight; the same on every rank.

        A draw on no account, or on several, is a bug of this package, and is logged. Collective over the world.
        """
        replica = self.replica
        with self.stream.still():
            enter_left_out(replica, self.tally)
            in_flight = len(replica.unfinished()) + len(self.stream.unfinished())
            ledger = Ledger() + replica.books.ledger  # a copy: the stream's thread goes on to enter draws
        waiting = len(replica.queues) + len(batch.groups)
        found = balance(self.ranks.of_leaders((ledger, OpenDraws(waiting=waiting, in_flight=in_flight))))
        if found.difference and self.ranks.is_global_leader:
            log.error(
                "the ledger of prompts does not balance by %d: please report this; %s", found.difference, found.line()
            )
        return found

    def report(self, step: int, steps: int, batch: RolloutBatch) -> Balance:
        """Write to ``status.json`` that ``step`` of ``steps`` are done; return the balance. Collective over the
        world."""
        found = self.balance(batch)
        status.report(step=step, steps=steps, counts=found.counts())
        return found

    def log(self, step: int, steps: int, batch: RolloutBatch) -> None:
        """Call :meth:`report`, and log the result."""
        line = self.report(step, steps, batch).line()
        if self.ranks.is_global_leader:
            log.info("%d of %d steps are done; %s", step, steps, line)

    def take_tally(self) -> Tally:
        """Return the counts of all replicas since the last call. Collective over the world."""
        total = Tally()
        for tally in self.ranks.of_leaders(self.tally.take()):
            total.merge(tally)
        return total
