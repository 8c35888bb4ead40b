"""Accounts of a collection beside those of ``test_collecting``: what is stale, too long, resumed, lost or of use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.admission import books
from megatron_dypo.collecting import Look, _draw, _is_useful, _stream, fill_queues
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.outcomes import Outcomes
from megatron_dypo.types import DropReason, Tier, Verdict
from tests.unit.loop_cases import PROMPTS, ROUND, Prompts, make_config, make_run, mixed, right, silent
from tests.unit.objective.test_route import graded
from tests.unit.rollout.fake_sglang import FakeSGLang, wait_until
from tests.unit.rollout.test_collect import closed_url
from tests.unit.test_serving import NextServer

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("at_limit", [True, False])
def test_groups_that_waited_too_long_are_stale_in_the_ledger_and_at_the_limit_they_are_not(
    tmp_path: Path, at_limit: bool
) -> None:
    config = make_config(tmp_path, batching={"prompts_per_update": ROUND, "max_staleness": 1})
    with FakeSGLang() as first, FakeSGLang(version="2") as second:
        run = make_run([first.url], config)
        fill_queues(run)
        run.step = 1 if at_limit else 2
        run.leader.client.serve([second.url])
        fill_queues(run)
    stale = 0 if at_limit else ROUND
    assert (run.leader.ledger.dropped[DropReason.STALE], run.tally["stale"]) == (stale, stale)
    assert len(run.leader.queues) == ROUND
    assert books(run).difference == 0


def test_the_groups_of_an_open_batch_wait_for_their_updates(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path))
        fill_queues(run)
    run.leader.queues.open_batch([0, 1], epochs=1)
    found = books(run)
    assert (found.open.waiting, found.open.in_flight, found.difference) == (ROUND, 0, 0)


def test_prompts_that_are_too_long_are_draws_and_count_as_such(tmp_path: Path) -> None:
    prompts = Prompts(too_long=[1, 4])
    run = make_run([NOWHERE], make_config(tmp_path), prompts=prompts)
    assert [prompt.order for prompt in _draw(run.leader, 6, 0, 1)] == [0, 2, 3, 5]
    assert (run.leader.cursor, run.leader.ledger.drawn) == (6, 6)
    found = books(run)
    assert found.ledger.dropped[DropReason.TOO_LONG] == run.tally["dropped_prompts"] == 2
    assert run.leader.outcomes.seen == 2
    assert found.difference == 4, "the draws of no collection"


def test_prompts_and_traces_that_draws_left_out_are_three_counts(tmp_path: Path) -> None:
    run = make_run([NOWHERE], make_config(tmp_path))
    run.leader.drops += [DropCounts(too_long=(1, 2), traces=3, wrong_traces=5), DropCounts(traces=10)]
    books(run)
    assert [run.tally[name] for name in ("dropped_prompts", "dropped_traces", "wrong_traces")] == [2, 13, 5]
    assert not run.leader.drops


@pytest.mark.parametrize(("start", "count", "shard", "own"), [(0, 7, 0, 3), (0, 7, 2, 2), (5, 4, 1, 1), (4, 2, 0, 0)])
def test_a_replica_draws_its_own_share(tmp_path: Path, start: int, count: int, shard: int, own: int) -> None:
    run = make_run([NOWHERE], make_config(tmp_path))
    run.leader.cursor = start
    prompts = _draw(run.leader, count, shard, 3)
    assert len(prompts) == run.leader.ledger.drawn == own
    assert all(prompt.order % 3 == shard for prompt in prompts)
    assert run.leader.cursor == start + count


@pytest.mark.parametrize("rollout", [{}, {"mode": "async"}, {"oversample": 1.5}])
def test_draws_of_the_run_before_come_first_and_are_graded_once(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout))
        run.leader.cursor, run.leader.ledger.drawn = 9, 2
        run.leader.unfinished = [Prompts().prompt(order) for order in (3, 7)]
        fill_queues(run)
        if run.leader.background is not None:
            run.leader.background.stop()
    orders = [group[0].order for group in run.leader.queues.groups()]
    assert {3, 7} <= set(orders)
    assert len(orders) == len(set(orders))
    assert run.leader.unfinished == []
    assert books(run).difference == 0


def test_samples_and_outcomes_are_of_the_collection_and_the_step_to_come(tmp_path: Path) -> None:
    with FakeSGLang() as first, FakeSGLang(version="1") as second:
        run = make_run([first.url], make_config(tmp_path))
        for step, fake in enumerate((first, second)):
            run.step = step
            run.leader.client.serve([fake.url])
            run.leader.queues.waiting = {treatment: [] for treatment in run.leader.queues.waiting}
            fill_queues(run)
            assert run.leader.outcomes.graded == ROUND
    files = sorted(path.name for path in (tmp_path / "samples").glob("*.jsonl"))
    assert files == ["step_000001.jsonl", "step_000002.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "samples" / files[1]).read_text().splitlines()]
    assert {row["step"] for row in rows} == {2}


@pytest.mark.parametrize(("tier", "traces", "is_useful"), [
    (Tier.EASY, ("a",), False),
    (Tier.MID, (), True),
    (Tier.HARD, ("a",), True),
    (Tier.HARD, (), False),
    (None, ("a",), False),
])  # fmt: skip
def test_a_group_is_of_use_where_it_will_wait_in_a_queue(
    tmp_path: Path, tier: Tier | None, traces: tuple[str, ...], is_useful: bool
) -> None:
    run = make_run([NOWHERE], make_config(tmp_path))
    assert _is_useful(run, replace(graded(0, [False], traces=traces), tier=tier)) is is_useful


@pytest.mark.parametrize(("lost", "is_said"), [(1, False), (2, True)])
def test_losses_are_said_where_they_are_more_than_a_quarter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int, is_said: bool
) -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        return "500" if body["input_ids"][-1] < 100 + lost else "ok"

    with FakeSGLang(plan) as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        run = make_run([fake.url], make_config(tmp_path, batching={"prompts_per_update": 2}))
        fill_queues(run)
    assert ("prompts could not be used" in caplog.text) is is_said


@pytest.mark.parametrize("rollout", [{}, {"oversample": 1.5}])
def test_a_batch_that_stays_short_is_said_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rollout: dict[str, Any]
) -> None:
    config = make_config(tmp_path, rollout=rollout, batching={"prompts_per_update": ROUND, "max_collect_rounds": 1})
    with FakeSGLang() as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        run = make_run([fake.url], config, judge=lambda row, n: right(row, n) if row % 2 else mixed(row, n))
        fill_queues(run)
        short = caplog.text
        caplog.clear()
        fill_queues(make_run([fake.url], config, judge=mixed))
    assert f"of {ROUND} prompts to learn from after" in short
    assert "the limit of batching.max_collect_rounds=1" in short
    assert "Easy" in short
    assert not caplog.text


def test_looks_of_replicas_add_up_but_for_what_they_share() -> None:
    end = RunEnded(Cause.SERVERS_GONE, "gone")
    one = Look(waiting=1, unscored=2, unserved=0, outcomes=Outcomes(graded=3), num_prompts=PROMPTS)
    other = Look(waiting=10, unscored=20, unserved=1, outcomes=Outcomes(graded=30), num_prompts=PROMPTS, failure=end)
    for total in (one + other, other + one):
        assert (total.waiting, total.unscored, total.unserved, total.outcomes.graded) == (11, 22, 1, 33)
        assert (total.num_prompts, total.failure) == (PROMPTS, end)


def test_a_second_round_is_collected_only_while_the_first_is_not_enough(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        enough = make_run([fake.url], make_config(tmp_path / "a"), judge=mixed)
        fill_queues(enough)
        config = make_config(tmp_path / "b", batching={"prompts_per_update": ROUND, "max_collect_rounds": 3})
        short = make_run([fake.url], config, judge=lambda row, n: right(row, n) if row % 2 else mixed(row, n))
        fill_queues(short)
    assert (enough.tally["max:rounds"], enough.leader.cursor) == (1, ROUND)
    assert (short.tally["max:rounds"], short.leader.cursor) == (2, 2 * ROUND)


def test_an_asynchronous_run_begins_the_groups_of_the_next_batch(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}))
        fill_queues(run)
        try:
            wait_until(lambda: len(fake.requests) >= 2 * ROUND, "the next batch is begun")
        finally:
            run.leader.background.stop()


def test_rollouts_without_a_verdict_are_losses_that_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FakeSGLang() as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        config = make_config(tmp_path, batching={"prompts_per_update": 2})
        run = make_run([fake.url], config, judge=lambda row, n: silent(row, n) if row < 2 else mixed(row, n))
        fill_queues(run)
    assert "2 of 4 prompts could not be used: 2 without a verdict" in caplog.text


def test_a_stream_that_lost_its_servers_gets_a_push_and_goes_on(tmp_path: Path) -> None:
    with FakeSGLang(version="0") as fake:
        run = make_run([closed_url()], make_config(tmp_path, rollout={"mode": "async"}))
        run.pushed, run.bridge = (), NextServer([fake.url] * 9)
        fill_queues(run)
        run.leader.background.stop()
    assert run.bridge.pushed
    assert len(run.leader.queues) >= ROUND


def test_a_stream_whose_groups_nobody_takes_draws_no_more_than_two_batches(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}), judge=right)
        stream = _stream(run, run.leader)
        stream.want(ROUND)
        stream.start()
        stream.wait(20.0, useful=10**9, resolved=2 * ROUND)
        stream.wait(0.5, useful=10**9, resolved=2 * ROUND + 1)
        done, _ = stream.take()
        stream.stop()
    assert len(done) == 2 * ROUND, "every group is Easy, so what is wanted is never there"


def test_the_progress_of_a_collection_is_what_waits_to_be_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def judge(row: int, member: int) -> Verdict:
        return mixed(row, member) if row == 0 else right(row, member)

    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}), judge=judge)
        fill_queues(run)
        run.leader.background.stop()
    waiting = len(run.leader.queues)
    assert 0 < waiting < ROUND
    assert f"rollouts: {waiting}/{ROUND} prompts to learn from" in capsys.readouterr().err
