"""The ranks that are blamed when a run stands still, and those that are not."""

import dataclasses
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.metrics.progress import progress
from megatron_dypo.metrics.status import RunStatus
from megatron_dypo.processes import watchdog
from megatron_dypo.processes.heartbeats import FOLDER, Heartbeat, blame, heartbeat_path, read_heartbeat, write_heartbeat
from megatron_dypo.processes.identity import own_identity
from megatron_dypo.processes.stalls import make_dump
from megatron_dypo.processes.watchdog import Watchdog, mark
from tests.support.present import present

PATIENCE_S = 100.0


class Left(Exception):  # noqa: N818
    """An exception in place of an exit."""


def leave(cause, message, before_exit=lambda: None):
    raise Left(cause, message)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Give ``ranks(3)``: the watchdogs of three ranks of one attempt, at time 0."""
    monkeypatch.setattr("megatron_dypo.processes.watchdog.time.monotonic", lambda: 0.0)
    monkeypatch.setattr(watchdog, "WORK", watchdog.Work())
    (tmp_path / FOLDER).mkdir()
    (tmp_path / "logs").mkdir()
    RunStatus(tmp_path, "this", 0).open()

    def make(count):
        made = []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(count))
            made.append(Watchdog(tmp_path, RunStatus(tmp_path, "this", rank), patience_s=PATIENCE_S, leave=leave))
        return made

    return make


def beat(rank, **fields):
    given = {"attempt": "this", "rank": rank, "host": f"node{rank}", "process": own_identity(), "beats": 1}
    given |= {"part": "update", "where": "step (a.py:1)", "stack": "step (a.py:1) < train (b.py:2)"}
    given |= {"is_in_collective": True, "idle_s": 0.0}
    return Heartbeat(**given | fields)


def test_ranks_that_beat_are_left_alone_however_long_they_wait(ranks):
    both = ranks(2)
    for now in range(0, 2000, 10):
        for rank in both:
            rank.look(float(now))


@pytest.mark.parametrize(("silent", "sees"), [(1, 0), (0, 2), (2, 1)])
def test_a_rank_that_gives_no_sign_of_life_is_named_by_the_one_before_it(ranks, tmp_path, silent, sees):
    mark("collecting")
    three = ranks(3)
    for rank in three:
        rank.look(0.0)
    others = [rank for number, rank in enumerate(three) if number != silent]
    with pytest.raises(Left) as left:
        look_in_turn(others, range(10, 200, 10))
    cause, message = left.value.args
    assert cause is Cause.RANK_HUNG
    assert re.search(rf"rank {silent} on .* \(process \d+\) has given no sign of life for 1[01]0 s", message)
    assert "; it was collecting at " in message
    log = (tmp_path / "logs" / f"rank_{sees:05d}.log").read_text()
    assert "the stacks of this rank's threads" in log
    assert "test_watchdog.py" in log


def test_a_rank_that_came_to_its_end_in_order_may_be_silent(ranks):
    first, second = ranks(2)
    first.look(0.0)
    second.look(0.0)
    second.finish()
    for now in range(0, 2000, 10):
        first.look(float(now))


def test_a_rank_that_never_came_is_named_after_a_time_for_starting(ranks):
    first, _ = ranks(2)
    first.look(0.0)
    first.look(watchdog.START_S - 1)
    with pytest.raises(Left, match=r"rank 1 has given no sign of life in .*another file system at run.dir"):
        first.look(watchdog.START_S)


def test_a_heartbeat_of_an_earlier_attempt_is_none(ranks, tmp_path):
    first, _ = ranks(2)
    write_heartbeat(tmp_path, beat(1, attempt="earlier"))
    first.look(0.0)
    first.look(PATIENCE_S)  # would count as silence if it were of this attempt


def test_no_rank_moves_for_the_one_outside_of_collectives(ranks, tmp_path):
    mark("update")
    first, *_ = ranks(3)
    write_heartbeat(tmp_path, beat(1, idle_s=101.0))
    write_heartbeat(tmp_path, beat(2, idle_s=101.0))
    with pytest.raises(Left) as left:
        stand(first, tmp_path, 1)
    # The main thread of this test waits for another thread, not in a collective.
    assert re.match(r"no rank moves: rank 0 on .* \(process \d+\) has not for \d+ s, update at ", left.value.args[1])


def test_no_rank_moves_for_the_one_that_never_came(ranks, tmp_path):
    mark("checking weights")
    first, *_ = ranks(3)
    write_heartbeat(tmp_path, beat(1, idle_s=101.0))
    with pytest.raises(Left, match=r"rank 2 has given no sign of life in .*rank_00002.json"):
        stand(first, tmp_path, 1)


def test_the_first_heartbeat_is_written_at_once(ranks, tmp_path):
    _, second = ranks(2)
    second.finish()
    heartbeat_path(tmp_path, 1).unlink()
    second.run()
    assert read_heartbeat(tmp_path, 1) is not None


def test_a_rank_that_moves_excuses_all_that_wait_for_it(ranks, tmp_path):
    mark("waiting for rollouts")
    first, *_ = ranks(3)
    write_heartbeat(tmp_path, beat(1, idle_s=300.0))
    write_heartbeat(tmp_path, beat(2, idle_s=99.0, is_in_collective=False, part="collecting"))
    stand(first, tmp_path, 1)


def test_start_up_may_take_its_time(ranks, tmp_path):
    first, _ = ranks(2)  # no mark yet
    write_heartbeat(tmp_path, beat(1, idle_s=300.0))
    stand(first, tmp_path, 1)


def test_a_main_thread_moves_as_long_as_work_is_counted(ranks):
    """A main thread that waits for workers, as in the checks of data and checkpoints, is at one place for long."""
    (only,) = ranks(1)
    mark("verifying the checkpoint")
    turns = []

    def look():
        with progress(10, "verify", "bytes", enabled=False) as bar:
            for turn in range(10):
                bar.update(1)
                only.look(turn * PATIENCE_S)
                turns.append(turn)
        only.look(10 * PATIENCE_S)

    with ThreadPoolExecutor(1) as pool, pytest.raises(Left, match=r"rank 0 on .* has not moved for 100 s: verifying"):
        pool.submit(look).result()
    assert len(turns) == 10


def test_a_single_rank_is_watched_by_its_own_thread(ranks):
    (only,) = ranks(1)
    mark("update")
    only.look(0.0)
    mark("update")
    only.look(PATIENCE_S)
    with pytest.raises(Left, match=r"rank 0 on .* has not moved for 100 s: update at "):
        stand(only, None, 0, start=PATIENCE_S)


def look_in_turn(ranks, times):
    for now in times:
        for rank in ranks:
            mark("collecting")
            rank.look(float(now))


def stand(rank, folder, neighbour, start=0.0):
    """Look from another thread while the main thread stands, and the neighbour's file changes."""

    def look():
        for turn in range(3):
            if neighbour:
                found = read_heartbeat(folder, neighbour)
                assert found is not None
                write_heartbeat(folder, dataclasses.replace(found, beats=turn + 10))
            rank.look(start + 1 + turn * PATIENCE_S)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look).result()


def test_a_rank_ends_with_a_run_that_has_ended_badly(ranks, tmp_path):
    first, second = ranks(2)
    for rank in (first, second):
        rank.look(0.0)
    RunStatus(tmp_path, "this", 1).end(Cause.BUG, "broken")
    second.look(1.0)
    second.look(watchdog.AFTER_END_S)
    with pytest.raises(Left):
        second.look(watchdog.AFTER_END_S + 1)


def test_a_rank_does_not_hurry_a_run_that_is_done(ranks, tmp_path):
    _, second = ranks(2)
    RunStatus(tmp_path, "this", 0).end(Cause.DONE, "")
    for now in range(0, 90, 10):
        second.look(float(now))


def test_blame_falls_on_ranks_outside_of_collectives_else_on_the_smallest_group():
    inside = [beat(rank) for rank in range(4)]
    outside = beat(4, is_in_collective=False)
    assert blame([*inside, outside]) == [outside]
    other = beat(5, where="elsewhere (b.py:2)")
    assert blame([*inside, other]) == [other]
    assert blame(inside) == inside


def test_a_heartbeat_is_overwritten_in_place_with_as_many_bytes(tmp_path):
    (tmp_path / FOLDER).mkdir()
    write_heartbeat(tmp_path, beat(3, part="a long name of a part"))
    before = heartbeat_path(tmp_path, 3).stat()
    write_heartbeat(tmp_path, beat(3, part="short"))
    after = heartbeat_path(tmp_path, 3).stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size) == (after.st_ino, 2048)


def test_a_stopped_rank_of_this_machine_leaves_its_stacks(tmp_path):
    program = f"""
import signal
from pathlib import Path
from megatron_dypo.metrics.logs import write_crashes
from megatron_dypo.processes.identity import own_identity
write_crashes({str(tmp_path)!r}, 1)
def stuck_here():
    print(own_identity().pid, own_identity().birth, flush=True)
    signal.pause()
stuck_here()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid, birth = present(process.stdout).readline().split()
    process.send_signal(signal.SIGSTOP)
    identity = dataclasses.replace(own_identity(), pid=int(pid), birth=birth)
    make_dump([beat(1, process=identity)], own_identity())
    assert process.wait(timeout=30) == -signal.SIGABRT
    assert "in stuck_here" in (tmp_path / "logs" / "rank_00001.log").read_text()
