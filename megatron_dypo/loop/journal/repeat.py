"""A collection from a stream is repeated after a resume: the same groups, in the same looks, as the journal lists them.

The lists count only on the weights that collected then, and only if every leader has all of its groups. If the run went
on from the collection, they must also be all of it: an update must not learn from a part. Otherwise the collection is
made anew, and what the journal holds may still stand for single requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dypo.loop.books.admission import Admitted
from megatron_dypo.loop.collect import Collector, admit_groups
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.records import Taken
from megatron_dypo.loop.replica import Leader
from megatron_dypo.types import GradedGroup

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The records of one leader's journal about a collection."""

    is_over: bool = False
    """Whether the collection ended then, and the run went on with later weights."""
    is_whole: bool = True
    """Whether all listed groups are there, and were collected by the weights of now."""
    is_complete: bool = True
    """Whether the journal says that these are all groups of the collection."""
    looks: tuple[int, ...] = ()
    """Looks that took any groups."""
    passed: tuple[int, ...] = ()
    """Looks after which log-probs of all waiting groups were computed."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """How far a collection was repeated; the same on every rank."""

    looks: int = 0
    is_over: bool = False
    """Whether it ended there. No stream starts then: it would sample draws again that later weights have sampled."""


def repeat_collection(collector: Collector, step: int, admitted: list[Admitted]) -> Repeated:
    """Admit the groups that the journals list for ``step``. Collective over the world."""
    journal, taken = collector.journal, list[Taken]()
    mine = Lists()
    if isinstance(journal, Journal) and isinstance(collector.replica, Leader):
        mine, taken = _lists_of(journal, collector.replica, step)
    lists = collector.ranks.of_leaders(mine)
    looks = {look for one in lists for look in (*one.looks, *one.passed)}
    is_over = any(one.is_over for one in lists)
    if not all(one.is_whole and (one.is_complete or not is_over) for one in lists):
        log.info("step %d: the collection of the run before cannot be repeated, it is made anew", step)
        journal.forget_collections(step)
        return Repeated()
    passed = sorted({look for one in lists for look in one.passed})
    for look in passed:
        _admit(collector, step, [one for one in taken if one.look <= look], admitted)
        taken = [one for one in taken if one.look > look]
        queues = collector.replica.queues
        queues.replace(collector.logprobs.complete(queues.groups(), step))
    if looks:
        _admit(collector, step, taken, admitted)
    return Repeated(looks=max(looks, default=-1) + 1, is_over=is_over)


def _lists_of(journal: Journal, leader: Leader, step: int) -> tuple[Lists, list[Taken]]:
    is_complete = journal.is_complete(step)
    taken, passed = journal.found.taken.pop(step, []), journal.found.passed.pop(step, [])
    orders = [order for one in taken for order in one.orders]
    is_whole = (
        all(journal.weights.are_mine({step: one.weights}) for one in taken)
        and len(orders) == len(set(orders))
        and leader.draws.are_open(orders)
        and journal.may_recall(orders)
    )
    looks = tuple(one.look for one in taken)
    lists = Lists(
        is_over=journal.is_over(step),
        is_whole=is_whole,
        is_complete=is_complete,
        looks=looks,
        passed=tuple(passed),
    )
    return lists, taken


def _admit(collector: Collector, step: int, taken: Sequence[Taken], admitted: list[Admitted]) -> None:
    """Admit the groups that these looks took; a group that cannot be read any more stays unfinished."""
    groups = list[GradedGroup]()
    orders = [order for one in taken for order in one.orders]
    for prompt in collector.replica.begin_listed(orders):
        group = collector.journal.recall(prompt)
        if isinstance(group, GradedGroup):
            groups.append(group)
    collector.replica.end_listed([group.prompt.order for group in groups])
    admitted.append(admit_groups(collector, step, groups, ()))
