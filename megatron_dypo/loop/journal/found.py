"""The records that earlier attempts of a run left in its journals."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_dypo.loop.journal.records import (
    Complete,
    Judged,
    Listed,
    Logged,
    Passed,
    Record,
    Served,
    Start,
    Taken,
    load,
)
from megatron_dypo.loop.journal.segment import Ending, Place, scan

log = logging.getLogger("megatron_dypo")

_SEGMENT = re.compile(r"segment_(\d{6,})\.bin")
_FOLDER = re.compile(r"replica_(\d{5,})")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished group in a file of a journal."""

    logged: Logged
    place: Place
    judged: Judged | None = None
    """Verdicts that have a record of their own."""

    def with_verdicts(self, judged: Judged) -> Entry:
        """Return the entry of the same group, with its verdicts."""
        logged = replace(
            self.logged,
            verdicts=judged.verdicts,
            trace_verdict=judged.trace_verdict,
            tier=judged.tier,
            is_graded=True,
        )
        return replace(self, logged=logged, judged=judged)


@dataclass(kw_only=True)
class Found:
    """The groups and collections that one replica of this run may use again."""

    entries: dict[int, Entry] = field(default_factory=dict)
    """Order of a draw → its last group."""
    taken: dict[int, list[Taken]] = field(default_factory=dict)
    """Step → what its collection took from the stream, in order."""
    passed: dict[int, list[int]] = field(default_factory=dict)
    """Step → looks of its collection after which log-probs were computed."""
    complete: dict[int, dict[int, Complete]] = field(default_factory=dict)
    """Step → replica → the record that its collection was complete."""
    served: int = -1
    """The newest version that servers were about to get."""

    def enter(self, record: Record, place: Place, *, replica: int, replicas: int) -> None:
        """Enter a record, of which only the draws of ``replica`` count."""
        if isinstance(record, Logged | Judged):
            if record.order % replicas == replica:
                self._enter_group(record, place)
        elif isinstance(record, Taken | Complete):
            own = tuple(order for order in record.orders if order % replicas == replica)
            self.enter_collection(replace(record, orders=own))
        elif not isinstance(record, Start):
            self.enter_collection(record)

    def enter_collection(self, record: Listed) -> None:
        """Enter a record about collections, all of whose draws count."""
        if isinstance(record, Taken):
            self.taken.setdefault(record.step, []).append(record)
        elif isinstance(record, Passed):
            self.passed.setdefault(record.step, []).append(record.look)
        elif isinstance(record, Complete):
            self.complete.setdefault(record.step, {})[record.replica] = record
        elif isinstance(record, Served):
            self.served = max(self.served, record.version)
        else:
            self.forget_collections(record.step)

    def forget_collections(self, step: int) -> None:
        """Forget the collections from ``step`` on."""
        self.taken = {number: taken for number, taken in self.taken.items() if number < step}
        self.passed = {number: looks for number, looks in self.passed.items() if number < step}
        self.complete = {number: records for number, records in self.complete.items() if number < step}
        self.served = min(self.served, step)

    def is_complete(self, step: int, *, replica: int, replicas: int) -> bool:
        """Return whether the lists of the collection of ``step`` are those of a whole one.

        They are not if a journal has lost its end, as in a crash of its machine, or the run was ended in a collection
        that an earlier attempt, from an older checkpoint, had ended.

        Args:
            replica: whose draws these are.
            replicas: of the run now. If those that collected were others, all of their journals count.
        """
        records = list(self.complete.get(step, {}).values())
        of_now = not records or any(one.replicas == replicas for one in records)
        wanted = {replica} if of_now else set(range(records[0].replicas))
        listed = sorted(order for one in self.taken.get(step, []) for order in one.orders)
        return wanted <= {one.replica for one in records} and listed == sorted(
            order for one in records for order in one.orders
        )

    def since(self, step: int, entries: Mapping[int, Entry]) -> Found:
        """Return what counts after a checkpoint of ``step``, with its groups at the places of ``entries``."""
        return Found(
            entries={order: entries[order] for order in self.entries if order in entries},
            taken={number: list(taken) for number, taken in self.taken.items() if number >= step},
            passed={number: list(looks) for number, looks in self.passed.items() if number >= step},
            complete={number: dict(records) for number, records in self.complete.items() if number >= step},
            served=self.served,
        )

    def collections(self) -> list[Taken | Passed | Complete | Served]:
        """Return the records of all collections."""
        taken = [record for records in self.taken.values() for record in records]
        passed = [Passed(step=step, look=look) for step, looks in self.passed.items() for look in looks]
        complete = [record for records in self.complete.values() for record in records.values()]
        return [*taken, *passed, *complete, Served(version=self.served)]

    def _enter_group(self, record: Logged | Judged, place: Place) -> None:
        if isinstance(record, Logged):
            self.entries[record.order] = Entry(logged=record, place=place)
        elif record.order in self.entries:
            self.entries[record.order] = self.entries[record.order].with_verdicts(record)


def folder_of(root: Path, replica: int) -> Path:
    """Return the folder of a replica's journal: ``root/replica_00000``."""
    return root / f"replica_{replica:05d}"


def segment_of(folder: Path, number: int) -> Path:
    """Return the path of a file of a journal: ``folder/segment_000000.bin``."""
    return folder / f"segment_{number:06d}.bin"


def number_of(segment: Path) -> int:
    """Return the number of a file that :func:`segments` found."""
    return int(segment.stem.removeprefix("segment_"))


def number_of_folder(folder: Path) -> int:
    """Return the replica of a folder that :func:`folders` found."""
    return int(folder.name.removeprefix("replica_"))


def segments(folder: Path) -> list[Path]:
    """Return the files of a journal, oldest first."""
    return sorted((path for path in folder.glob("segment_*") if _SEGMENT.fullmatch(path.name)), key=number_of)


def folders(root: Path) -> list[Path]:
    """Return the folders of all journals of a run, by replica."""
    return sorted(path for path in root.glob("replica_*") if _FOLDER.fullmatch(path.name) and path.is_dir())


def read_journals(root: Path, *, replica: int, replicas: int, setting: str) -> Found:
    """Read the records that this replica may use: those of its own draws, whichever replica wrote them.

    Files that a run with another number of replicas wrote come first: they are older. Of files that this number wrote
    only the replica's own hold its draws.
    """
    found, own = Found(), folder_of(root, replica)
    paths = [path for folder in folders(root) for path in segments(folder)]
    for of_this_number in (False, True):
        for path in paths:
            start, records = _open(path)
            if start is None or (start.replicas == replicas) != of_this_number:
                continue
            if of_this_number and path.parent != own:
                continue
            if start.setting != setting:
                log.warning("%s: was written under another configuration or for other data; it is not used", path)
                continue
            for place, record in records:
                found.enter(record, place, replica=replica, replicas=replicas)
    return found


def _open(path: Path) -> tuple[Start | None, Iterator[tuple[Place, Record]]]:
    """Return the first record of a file and the others; None if it has no first record."""
    records = _records(path)
    _, first = next(records, (None, None))
    return (first if isinstance(first, Start) else None), records


def _records(path: Path) -> Iterator[tuple[Place, Record]]:
    """Yield the records of a file up to its first damaged one, and log how they end."""
    try:
        for item in scan(path):
            if item is Ending.TORN:
                log.info("%s: its last record is incomplete, as after a kill; it is left out", path)
            elif isinstance(item, Ending):
                if item is Ending.DAMAGED:
                    log.warning("%s: a record is damaged: it and all after it are not used, but made again", path)
            else:
                place, payload = item
                yield place, load(payload)
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read further, the rest of it is made again: %s", path, error)
