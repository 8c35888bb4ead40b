"""``status.json``: one record for each attempt; the first end counts."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.launch.attempt import terminal_line
from megatron_dypo.metrics import status
from megatron_dypo.metrics.status import Record, RunStatus, current, read_status, report
from tests.support.present import present


@pytest.fixture
def first(tmp_path):
    made = RunStatus(tmp_path, "attempt", 0)
    made.open()
    return made


def test_an_attempt_runs_until_somebody_says_why_it_ends(tmp_path, first):
    assert present(read_status(tmp_path)).state == "running"
    assert first.ended() is None
    RunStatus(tmp_path, "attempt", 3).end(Cause.DISK_FULL, "no room")
    found = json.loads((tmp_path / "status.json").read_text())
    assert {"state": "ended", "cause": "disk_full", "status": 74, "requeue": False, "rank": 3}.items() <= found.items()
    assert found["message"] == "no room"
    assert found["what_to_do"] == Cause.DISK_FULL.value.advice
    assert found["started"] <= found["ended"]


def test_of_many_ends_one_counts(tmp_path, first):
    ranks = {rank: RunStatus(tmp_path, "attempt", rank) for rank in range(16)}
    with ThreadPoolExecutor(16) as pool:
        written = [r for r in pool.map(lambda rank: ranks[rank].end(Cause.BUG, f"rank {rank}"), ranks) if r]
    assert len(written) == 1
    assert read_status(tmp_path) == written[0]
    assert not list(tmp_path.glob("*.json.*"))


def test_a_report_does_not_undo_an_end(tmp_path, first, monkeypatch):
    monkeypatch.setattr(status, "WRITE_EVERY_S", 0.0)
    with current(first):
        report(step=1, steps=4)
        RunStatus(tmp_path, "attempt", 1).end(Cause.BUG, "broken")
        report(step=2, steps=4)
    assert present(read_status(tmp_path)).cause == "bug"
    # The same if the two crossed: the report read "running", and wrote after the end.
    status.write_record(tmp_path / "status.json", Record(attempt="attempt"))
    first.settle()
    assert present(read_status(tmp_path)).cause == "bug"


def test_the_next_attempt_starts_anew_and_the_last_ones_ranks_cannot_end_it(tmp_path, first):
    first.end(Cause.BUG, "broken")
    RunStatus(tmp_path, "next", 0).open()
    assert present(read_status(tmp_path)).state == "running"
    assert first.end(Cause.RANK_LOST, "late") is None
    assert first.ended() is None
    assert present(read_status(tmp_path)).state == "running"


def test_an_end_tells_what_its_rank_reported_last(tmp_path, first):
    with current(first):
        report(step=10, steps=400)
        report(step=12, steps=400, counts={"groups": 48, "dropped": 3})
    first.end(Cause.STOPPED, "stopped")
    found = present(read_status(tmp_path))
    assert (found.first_step, found.step, found.steps, found.counts) == (10, 12, 400, {"groups": 48, "dropped": 3})
    assert found.progress() == "12 of 400 steps are done; groups: 48, dropped: 3"


def test_a_rank_that_cannot_speak_is_told_of_with_the_first_ranks_progress(tmp_path, first):
    with current(first):
        report(step=10, steps=400)
    RunStatus(tmp_path, "attempt", -1).end(Cause.RANK_LOST, "rank 1 was killed by SIGKILL")
    assert (present(read_status(tmp_path)).step, present(read_status(tmp_path)).rank) == (10, -1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running", "unknown": 1}', "\0"])
def test_a_status_file_that_cannot_be_read_is_none(tmp_path, text):
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
    RunStatus(tmp_path, "attempt", 0).open()
    assert present(read_status(tmp_path)).state == "running"


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, first, monkeypatch):
    def refuse(path, record):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(status, "write_record", refuse)
    with current(first):
        report(step=1, steps=2)
    assert present(read_status(tmp_path)).step == 0


def test_reports_outside_of_a_run_go_nowhere():
    report(step=1, steps=2)


def test_a_users_mistake_is_told_in_its_own_words():
    record = Record(message="run.steps=0: must be positive")
    assert terminal_line(record, Cause.BAD_INPUT) == "megatron-dypo: error: run.steps=0: must be positive"
