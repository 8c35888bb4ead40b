"""Runs with a stream whose journals have lost a part of a collection: no update learns from a part of its batch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.journal.found import Found, folder_of, segments
from megatron_dypo.loop.journal.records import Complete, Served, Taken, load
from megatron_dypo.loop.journal.segment import Ending, Place, scan
from tests.support.journal_cases import Attempt, Stored
from tests.support.loop_cases import ROUND
from tests.unit.loop.test_journal_of_killed_runs import config_of


def answer_slowly(index: int, body: dict[str, Any]) -> str:
    """Answer so late that a collection takes several looks."""
    time.sleep(0.25)
    return "ok"


def unsaved(folder: Path) -> Config:
    """Return the configuration of a run that saves nothing before its end."""
    return replace(config_of("async", folder), checkpoint=CheckpointConfig(every=0))


def places(segment: Path, kind: type[Taken | Complete | Served], step: int) -> list[Place]:
    """Return the places of the records about the collection of ``step``."""
    found = [item for item in scan(segment) if not isinstance(item, Ending)]
    records = [(place, load(payload)) for place, payload in found]
    return [place for place, record in records if isinstance(record, kind) and getattr(record, "step", None) == step]


def require_whole_batches(attempt: Attempt) -> None:
    assert {step: len(orders) for step, orders in attempt.learned.items()} == dict.fromkeys(attempt.learned, ROUND)
    learned = [order for orders in attempt.learned.values() for order in orders]
    assert len(learned) == len(set(learned))


def test_a_flipped_bit_in_a_list_does_not_shorten_its_batch(tmp_path: Path) -> None:
    config = unsaved(tmp_path)
    for kill_at in (45, 40):
        assert Attempt(config=config, kill_at=kill_at, plan=answer_slowly).make().is_killed
    segment = segments(folder_of(tmp_path / "journal", 0))[0]
    looks = places(segment, Taken, 0)
    assert len(looks) > 1, "the first record that is lost is in the middle of the list"
    content = bytearray(segment.read_bytes())
    content[looks[1].start + 30] ^= 1
    segment.write_bytes(content)
    resumed = Attempt(config=config).make()
    assert not resumed.is_killed
    require_whole_batches(resumed)


@pytest.mark.parametrize("lost", [Taken, Complete])
def test_a_replica_whose_journal_has_lost_its_end_does_not_shorten_the_batch(
    tmp_path: Path, lost: type[Taken | Complete]
) -> None:
    config = unsaved(tmp_path)
    killed = Attempt(config=config, world=(2, 1), kill_at=50, plan=answer_slowly).make()
    assert killed.learned
    segment = segments(folder_of(tmp_path / "journal", 1))[-1]
    with segment.open("r+b") as file:
        file.truncate(places(segment, lost, 0)[-1].start)
    resumed = Attempt(config=config, world=(2, 1)).make()
    assert not resumed.is_killed
    require_whole_batches(resumed)


@pytest.mark.parametrize("kill_at", [10, 13])
def test_a_run_that_is_killed_after_it_went_back_to_an_older_checkpoint_learns_from_whole_batches(
    tmp_path: Path, kill_at: int
) -> None:
    """The journal begins at the newest checkpoint, which is damaged, and says that later weights were served.

    The moments are in the first collection.
    """
    config = config_of("async", tmp_path)
    whole = Attempt(config=config).make()
    (saved,) = (policy.saved for policy in whole.policies)
    older = Stored(
        step=2,
        history=saved[2]["history"],
        trainer_state=saved[2]["trainer_state"],
        leader_states=list(saved[2]["leader_states"]),
    )
    killed = Attempt(config=config, kill_at=kill_at, stored=older, drift=0.5, plan=answer_slowly).make()
    assert killed.is_killed
    resumed = Attempt(config=config, stored=older, drift=0.5).make()
    assert sorted(resumed.learned) == [3, 4, 5]
    require_whole_batches(resumed)


def test_the_lists_of_other_replicas_are_complete_if_all_of_them_say_so() -> None:
    of_two = [Complete(step=4, orders=(index, index + 2), replica=index, replicas=2) for index in range(2)]
    taken = [Taken(step=4, look=0, orders=(index, index + 2), weights="four") for index in range(2)]
    nowhere = Place(path=Path("segment"), number=0, start=0, size=0)

    def is_complete(*records: Taken | Complete, replica: int, replicas: int) -> bool:
        found = Found()
        for record in records:
            found.enter(record, nowhere, replica=replica, replicas=replicas)
        return found.is_complete(4, replica=replica, replicas=replicas)

    assert is_complete(*taken, *of_two, replica=0, replicas=1), "two replicas became one"
    assert is_complete(*taken, *of_two, replica=2, replicas=4), "and four"
    assert not is_complete(*taken, of_two[0], replica=0, replicas=1)
    assert not is_complete(taken[0], of_two[0], replica=0, replicas=1)
    assert not is_complete(taken[0], *of_two, replica=0, replicas=1)
    assert is_complete(taken[1], of_two[1], replica=1, replicas=2)
    assert not is_complete(taken[1], of_two[0], replica=1, replicas=2)
    assert not is_complete(replica=0, replicas=1), "nothing says that a collection took nothing"
    nothing = Complete(step=4, orders=(), replica=0, replicas=1)
    assert is_complete(nothing, replica=0, replicas=1)
