"""The journal of a replica's leader: finished groups on the disk, so that a resume makes again only those in flight.

**What is written.** Each group as soon as its rollouts are whole, its verdicts, and which groups each collection took
from a stream. See :mod:`megatron_dypo.loop.journal.segment` for the crashes that a record survives: a kill of the
process, but not of the machine, which loses the last seconds.

**What a resumed run may use again.** The run resumes at the step s of a checkpoint, and repeats the steps after it.
When it is to sample a draw, it takes the draw's group from the journal instead if, and only if,

1. the group was made for the same prompt (its tokens) under the same configuration of sampling, grading and objective,
   and from the same data (``setting``);
2. every version that sampled one of its tokens is a version that this run has had too, with the same digest of the
   weights: a version up to s is known from the checkpoint, and a version after s once the repeated updates have made
   it again, bit for bit. If they made other weights, its groups are those of a slightly different policy, and are not
   used;
3. a server could have returned it now: in rounds its newest version is the current one; from a stream it is at most
   ``max_staleness`` old, like any group that waited.

A synchronous run asks for the same draws at the same versions as before, so it takes what it finds, and ends as the
uninterrupted run, bit for bit. A stream's groups depend on the time that servers took; so the journal also lists the
groups that each collection took, and :mod:`megatron_dypo.loop.journal.repeat` repeats those collections from the list.
The weights so come out the same, and the groups that they sampled count.

**What it takes.** The files begin anew at each checkpoint: groups that the checkpoint contains, or that were trained on
before it, go with the old files. Above ``limit_bytes`` the journal stops to grow, and says so once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_dypo.fs import remove
from megatron_dypo.loop.journal.found import Entry, Found
from megatron_dypo.loop.journal.records import (
    Complete,
    Decode,
    Judged,
    Listed,
    Logged,
    Passed,
    Served,
    Taken,
    Void,
    as_group,
    dump,
    dump_group,
    load_rollouts,
    logged_of,
    prompt_digest,
    versions_of,
)
from megatron_dypo.loop.journal.segment import read
from megatron_dypo.loop.journal.weights import Weights
from megatron_dypo.loop.journal.writer import SegmentWriter
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup

log = logging.getLogger("megatron_dypo")


@dataclass(kw_only=True)
class Journal:
    """The journal of one replica. Any thread may call its methods."""

    writer: SegmentWriter
    weights: Weights
    decode: Decode
    max_version_lag: int
    """Versions that a group from a stream may be behind."""
    replica: int = 0
    """Whose draws it has."""
    replicas: int = 1
    """Replicas of the run."""
    found: Found = field(default_factory=Found)
    """The records of earlier attempts, from which a group is taken at most once."""
    surplus: Sequence[Path] = ()
    """Folders of replicas that this run does not have, to be removed once all leaders have read them."""
    reused: int = 0
    """Groups that were taken from the journal."""
    refused: int = 0
    """Groups in it that had to be made again."""
    _told: int = 0
    """Those of ``reused`` that :meth:`count_reused` has returned."""
    _written: dict[int, Entry] = field(default_factory=dict)
    """Order → the group of that draw in the files of now."""
    _listed: Found = field(default_factory=Found)
    """The collections in the files of now: those of ``found``, and those of this attempt."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._written = dict(self.found.entries)
        self._listed = self.found.since(0, {})

    def adopt(self) -> None:
        """Copy the groups that the journals of other replicas hold into this one. Call it before anything else."""
        for order, entry in self.found.entries.items():
            payload = None if entry.place.path.parent == self.writer.folder else read(entry.place)
            if payload is not None and (place := self.writer.append(payload)) is not None:
                self._written[order] = replace(entry, place=place)
                if entry.judged is not None:
                    self.writer.append(dump(entry.judged))
        self.found.entries = dict(self._written)

    def add(self, group: RolloutGroup | GradedGroup) -> None:
        """Write a finished group, graded or not."""
        if not (weights := self.weights.of(versions_of(group.rollouts))):
            return  # without rollouts, or of weights that this run has not brought to any server
        logged = logged_of(group, weights)
        payload = dump_group(logged, group.rollouts)
        with self._lock:
            if (place := self.writer.append(payload)) is not None:
                self._written[logged.order] = Entry(logged=logged, place=place)

    def judge(self, groups: Sequence[GradedGroup]) -> None:
        """Write the verdicts on groups that :meth:`add` has written without."""
        for group in groups:
            order = group.prompt.order
            judged = Judged(order=order, verdicts=group.verdicts, trace_verdict=group.trace_verdict, tier=group.tier)
            with self._lock:
                if order in self._written and self.writer.append(dump(judged)) is not None:
                    self._written[order] = self._written[order].with_verdicts(judged)

    def take(self, step: int, look: int, orders: Sequence[int]) -> None:
        """Write which groups a look of the collection of ``step`` took from the stream."""
        if orders and (weights := self.weights.of([step])) is not None:
            self._list(Taken(step=step, look=look, orders=tuple(orders), weights=weights[step]))

    def compute_logprobs(self, step: int, look: int) -> None:
        """Write that log-probs of all waiting groups were computed after a look."""
        self._list(Passed(step=step, look=look))

    def complete(self, step: int) -> None:
        """Write that the collection of ``step`` is complete, with what its looks took."""
        orders = tuple(order for one in self._listed.taken.get(step, []) for order in one.orders)
        self._list(Complete(step=step, orders=orders, replica=self.replica, replicas=self.replicas))

    def forget_collections(self, step: int) -> None:
        """Let no collection from ``step`` on be repeated from what was written so far."""
        self.found.forget_collections(step)
        self._list(Void(step=step))

    def recall(self, prompt: Prompt, *, version: int | None = None) -> RolloutGroup | GradedGroup | None:
        """Return the group of a draw, if the rule above lets it stand for a request.

        Args:
            version: its newest version must be this one; None: it is for a stream.
        """
        with self._lock:
            entry = self.found.entries.pop(prompt.order, None)
            if entry is None:
                return None
            # Under the lock: a checkpoint moves all groups to a new file, and removes the file of this place.
            payload = read(entry.place) if self._may_stand(entry.logged, version) else None
        group = self._group(entry.logged, payload, prompt)
        with self._lock:
            self.reused += group is not None
            self.refused += group is None
            if group is None:
                self._written.pop(prompt.order, None)  # later verdicts are on the group that is made now
        return group

    def may_recall(self, orders: Collection[int]) -> bool:
        """Return whether the groups of all these draws may stand for requests of a stream now."""
        with self._lock:
            entries = [self.found.entries.get(order) for order in orders]
        return all(
            entry is not None and entry.logged.is_graded and self._may_stand(entry.logged, None) for entry in entries
        )

    def serve(self, version: int) -> None:
        """Write that servers are about to get these weights."""
        self._list(Served(version=version))

    def is_over(self, step: int) -> bool:
        """Return whether the run before ended the collection of ``step``, and went on with later weights."""
        return self.found.served > step

    def is_complete(self, step: int) -> bool:
        """Return whether the lists of the collection of ``step`` are all of it."""
        return self.found.is_complete(step, replica=self.replica, replicas=self.replicas)

    def count_reused(self) -> int:
        """Return the number of groups that were taken from the journal since the last call."""
        with self._lock:
            since, self._told = self.reused - self._told, self.reused
        return since

    def begin_anew(self, step: int, unfinished: Collection[int], cursor: int) -> None:
        """Keep only records that a run resumed from the new checkpoint of ``step`` may use; remove all others.

        Args:
            unfinished: orders of the checkpoint's unfinished draws, of all replicas.
            cursor: position of its next draw. A stream may have gone on since.
        """
        wanted = set(unfinished)
        with self._lock:
            kept = {order: entry for order, entry in self._written.items() if order in wanted or order >= cursor}
            payloads = {order: payload for order, entry in kept.items() if (payload := read(entry.place)) is not None}
            judged = [kept[order].judged for order in payloads]
            listed = self._listed.since(step, {})
            others = [dump(record) for record in (*judged, *listed.collections()) if record is not None]
            places = self.writer.renew([*payloads.values(), *others])
            if places is None:
                return
            placed = zip(payloads, places[: len(payloads)], strict=True)
            self._written = {order: replace(kept[order], place=place) for order, place in placed}
            self.found, self._listed = self.found.since(step, self._written), listed
        for folder in self.surplus:
            remove(folder)
        self.surplus = ()

    def close(self) -> None:
        """Close the file of the journal, and log how much of it was used."""
        self.writer.close()
        if self.reused or self.refused:
            log.info(
                "the journal of this run gave %d finished groups; %d in it did not fit its weights any more and were "
                "made again",
                *(self.reused, self.refused),
            )

    def _may_stand(self, logged: Logged, version: int | None) -> bool:
        if not self.weights.are_mine(logged.weights):
            return False
        if version is not None:
            return logged.newest == version
        return max(self.weights.known) - logged.oldest <= self.max_version_lag

    def _group(self, logged: Logged, payload: bytes | None, prompt: Prompt) -> RolloutGroup | GradedGroup | None:
        if payload is None or logged.prompt != prompt_digest(prompt.tokens):
            return None
        return as_group(logged, load_rollouts(payload, self.decode), prompt)

    def _list(self, record: Listed) -> None:
        with self._lock:
            self._listed.enter_collection(record)
            self.writer.append(dump(record))
