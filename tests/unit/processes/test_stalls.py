"""Warnings of stalls: who is named, when, how often, and that no clock but the monotonic one counts."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.metrics.status import RunStatus
from megatron_dypo.processes import watchdog
from megatron_dypo.processes.heartbeats import FOLDER, Heartbeat, read_heartbeat, write_heartbeat
from megatron_dypo.processes.identity import own_identity
from megatron_dypo.processes.watchdog import Watchdog, begin_step, mark

PATIENCE_S = 1800.0
STEP_S = 6.0


class Clock:
    """A clock that a test moves."""

    now = 5000.0


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Open a run whose step usually takes 6 s, of which 1 is the update."""
    clock = Clock()
    monkeypatch.setattr("megatron_dypo.processes.watchdog.time.monotonic", lambda: clock.now)
    monkeypatch.setattr(watchdog, "WORK", watchdog.Work())
    (tmp_path / FOLDER).mkdir()
    (tmp_path / "logs").mkdir()
    RunStatus(tmp_path, "this", 0).open()
    for _ in range(4):
        begin_step()
        mark("collecting rollouts")
        clock.now += STEP_S - 1
        mark("updating")
        clock.now += 1
    begin_step()
    mark("updating")
    return clock


@pytest.fixture
def open_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Watchdog]:
    """Give ``open_rank(1, 3)``: the watchdog of rank 1 of 3."""

    def leave(cause: object, message: str, before_exit: object = None) -> None:
        raise AssertionError(f"the run ended: {message}")

    def make(rank: int, count: int) -> Watchdog:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        return Watchdog(tmp_path, RunStatus(tmp_path, "this", rank), patience_s=PATIENCE_S, leave=leave)

    return make


def beat(rank: int, **fields: Any) -> Heartbeat:
    given: dict[str, Any] = {"attempt": "this", "rank": rank, "host": f"node{rank}", "process": own_identity()}
    given |= {"beats": 1, "part": "updating", "where": "step (a.py:1)", "stack": "step (a.py:1) < train (b.py:2)"}
    return Heartbeat(**given | {"is_in_collective": True, "idle_s": 0.0, "part_s": 0.0} | fields)


def renew(folder: Path, *ranks: int) -> None:
    for rank in ranks:
        found = read_heartbeat(folder, rank)
        assert found is not None
        write_heartbeat(folder, dataclasses.replace(found, beats=found.beats + 1))


def begin_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the steps of the fixture: the first part of a start begins."""
    monkeypatch.setattr(watchdog, "WORK", watchdog.Work())
    mark("checking weights")


def stalls(folder: Path) -> list[str]:
    """Return the first rank's warnings."""
    log = folder / "logs" / "rank_00000.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if " W megatron_dypo: stall" in line]


def test_a_silent_rank_is_named_once_within_three_steps_and_a_minute(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    first, second = open_rank(0, 3), open_rank(1, 3)
    for rank in (0, 1, 2):
        write_heartbeat(tmp_path, beat(rank))
    stopped_at = clock.now
    while not stalls(tmp_path):
        clock.now += 10.0
        assert clock.now <= stopped_at + 3 * STEP_S + 60.0
        renew(tmp_path, 1)
        first.look(clock.now)
        second.look(clock.now)
    for _ in range(20):
        clock.now += 10.0
        renew(tmp_path, 1)
        first.look(clock.now)
        second.look(clock.now)
    (line,) = stalls(tmp_path)
    assert "stall: rank 2 on node2 (process " in line
    assert "no sign of life for " in line
    assert "(a step usually takes 6.0 s); it was updating at step (a.py:1) < train (b.py:2)" in line
    assert line.endswith("run.watchdog_s=1800 will end the run")


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_silent_rank_is_named_within_a_minute_in_the_first_steps_of_a_start(
    tmp_path: Path, clock: Clock, open_rank: Any, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    begin_start(monkeypatch)
    for _ in range(steps):
        begin_step()
        mark("updating")
        clock.now += STEP_S
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1))
    first.look(clock.now)
    stopped_at = clock.now
    while not stalls(tmp_path):
        clock.now += 10.0
        assert clock.now <= stopped_at + 60.0
        first.look(clock.now)
    assert "stall: rank 1 on node1 (process " in stalls(tmp_path)[0]
    assert "a step usually takes" not in stalls(tmp_path)[0]


@pytest.mark.parametrize("steps", [0, 4])
def test_a_job_that_is_suspended_as_a_whole_names_nobody(
    tmp_path: Path, clock: Clock, open_rank: Any, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """All ranks stop at once. Each looks as soon as it runs again, perhaps before the next one has written."""
    if not steps:
        begin_start(monkeypatch)
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1))
    for suspended_s in (5.0, 29.0, 31.0, 3600.0):
        begin_step()
        mark("updating")
        renew(tmp_path, 1)
        first.look(clock.now)
        clock.now += 10.0  # the last look before the stop
        first.look(clock.now)
        clock.now += suspended_s
        if suspended_s > 30.0:  # as the body of the thread does after three looks
            first.excuse(suspended_s)
        first.look(clock.now)
        renew(tmp_path, 1)
        first.look(clock.now)
    assert stalls(tmp_path) == []


@pytest.mark.parametrize("steps", [0, 1])
def test_a_rank_that_still_imports_may_be_silent_for_longer(
    tmp_path: Path, clock: Clock, open_rank: Any, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    begin_start(monkeypatch)
    for _ in range(steps):
        begin_step()
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1, part="starting"))
    first.look(clock.now)
    clock.now += 290.0
    first.look(clock.now)
    assert stalls(tmp_path) == []
    clock.now += 20.0
    first.look(clock.now)
    assert len(stalls(tmp_path)) == 1


def test_a_rank_that_is_silent_since_it_imported_is_named_as_any_other_once_all_have_done_a_step(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    """A heartbeat comes every 10 s; a rank may import, do some short steps and be stopped between two of them."""
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1, part="starting"))
    first.look(clock.now)
    stopped_at = clock.now
    while not stalls(tmp_path):
        clock.now += 10.0
        begin_step()  # so that no part takes too long
        first.look(clock.now)
        assert clock.now <= stopped_at + 60.0


def test_a_rank_that_comes_back_is_told_and_may_stall_again(tmp_path: Path, clock: Clock, open_rank: Any) -> None:
    second = open_rank(1, 3)
    write_heartbeat(tmp_path, beat(2))
    for _ in range(2):
        for _ in range(7):
            clock.now += 10.0
            second.look(clock.now)
        renew(tmp_path, 2)
        second.look(clock.now)
    kinds = [line.partition("megatron_dypo: ")[2].partition(": ")[0] for line in stalls(tmp_path)]
    assert kinds == ["stall", "stall over"] * 2


def test_a_part_that_takes_too_long_names_the_ranks_that_others_wait_for(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    first = open_rank(0, 3)
    write_heartbeat(tmp_path, beat(1))
    write_heartbeat(tmp_path, beat(2, is_in_collective=False))
    for _ in range(20):
        clock.now += 10.0
        renew(tmp_path, 1, 2)
        first.look(clock.now)
    # The main thread of this test, which is rank 0, is in no collective either.
    (line,) = stalls(tmp_path)
    assert "stall: rank 0 on " in line
    assert "(and 1 more rank like it) has been updating for " in line
    assert "(usually 1.0 s); it is at " in line
    mark("refitting")
    first.look(clock.now)
    assert "stall over: rank 0 on " in stalls(tmp_path)[1]


def test_a_part_that_takes_too_long_names_a_silent_rank_in_both_of_its_lines(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    first = open_rank(0, 4)
    for rank in (1, 2, 3):
        write_heartbeat(tmp_path, beat(rank))
    for _ in range(20):
        clock.now += 10.0
        renew(tmp_path, 1)
        first.look(clock.now)
    renew(tmp_path, 1, 2, 3)
    mark("refitting")
    first.look(clock.now)
    said = [line.partition("megatron_dypo: ")[2] for line in stalls(tmp_path)]
    assert len(said) == 4
    for rank in (2, 3):
        assert said[rank - 2].startswith(f"stall: rank {rank} on ")
        assert "has given no sign of life" in said[rank - 2]
        assert said[rank].startswith(f"stall over: rank {rank} on ")


@pytest.mark.parametrize("late_s", [0.0, 3.0, 6.5, 9.9])
def test_a_silent_rank_that_no_neighbour_sees_is_named_within_a_minute(
    tmp_path: Path, clock: Clock, open_rank: Any, late_s: float
) -> None:
    """The ranks stop ``late_s`` before the first rank's next look, at the beginning of a part."""
    first = open_rank(0, 4)
    for rank in (1, 2, 3):
        write_heartbeat(tmp_path, beat(rank))
    mark("updating")
    stopped_at = clock.now
    clock.now += late_s
    while not stalls(tmp_path):
        renew(tmp_path, 1)
        first.look(clock.now)
        clock.now += 10.0
        assert clock.now - 10.0 <= stopped_at + 3 * STEP_S + 60.0
    # Rank 1 would name rank 2 earlier.
    assert clock.now - 10.0 <= stopped_at + 3.0 + 60.0, "three times the usual second of this part, and a minute"


def test_a_rank_whose_part_takes_too_long_writes_its_own_stacks_once(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    second = open_rank(1, 3)
    write_heartbeat(tmp_path, beat(2))
    for _ in range(20):
        clock.now += 10.0
        renew(tmp_path, 2)
        second.look(clock.now)
    assert stalls(tmp_path) == [], "the first rank warns"
    text = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert text.count("this rank has been updating for ") == 1
    assert "test_stalls.py" in text


def test_a_part_without_a_usual_time_may_be_long_while_a_rank_moves(
    tmp_path: Path, clock: Clock, open_rank: Any
) -> None:
    first = open_rank(0, 2)
    mark("evaluating")
    write_heartbeat(tmp_path, beat(1))
    for _ in range(600):
        clock.now += 10.0
        renew(tmp_path, 1)
        mark("evaluating")
        first.look(clock.now)
    assert stalls(tmp_path) == []


def test_steps_of_the_usual_length_never_warn(tmp_path: Path, clock: Clock, open_rank: Any) -> None:
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1))
    for _ in range(200):
        begin_step()
        mark("collecting rollouts")
        clock.now += STEP_S - 1
        renew(tmp_path, 1)
        first.look(clock.now)
        mark("updating")
        clock.now += 1
    assert stalls(tmp_path) == []


@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
def test_a_step_of_the_time_of_day_fires_nothing(
    tmp_path: Path, clock: Clock, open_rank: Any, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    first, only, read = open_rank(0, 2), open_rank(0, 1), time.time
    monkeypatch.setattr(time, "time", lambda: read() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: int((read() + jump_s) * 1e9))
    write_heartbeat(tmp_path, beat(1))
    for _ in range(3):
        begin_step()
        mark("updating")
        clock.now += 1
        renew(tmp_path, 1)
        first.look(clock.now)
        only.look(clock.now)
    assert stalls(tmp_path) == []


def test_a_watchdog_that_was_stopped_itself_excuses_the_others(tmp_path: Path, clock: Clock, open_rank: Any) -> None:
    first = open_rank(0, 2)
    write_heartbeat(tmp_path, beat(1))
    first.look(clock.now)
    clock.now += 7200.0  # the whole job was suspended; longer than run.watchdog_s
    first.excuse(7200.0)
    first.look(clock.now)
    renew(tmp_path, 1)
    first.look(clock.now + 10.0)
    assert stalls(tmp_path) == []
