"""Accounts of a collection that ``test_collecting`` lacks: groups that are stale, too long, resumed, lost or of use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.books.outcomes import Outcomes
from megatron_dypo.loop.collect import Look
from megatron_dypo.loop.draws import Draws
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import will_learn_from
from megatron_dypo.types import DropReason, Tier, Verdict
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.support.graded_groups import graded
from tests.support.loop_cases import (
    PROMPTS,
    ROUND,
    NextServer,
    Prompts,
    collect_groups,
    leader_of,
    make_config,
    make_run,
    mixed,
    right,
    serve,
    silent,
)
from tests.support.rollout.clients import closed_url

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("at_limit", [True, False])
def test_groups_that_waited_too_long_are_stale_in_the_ledger_and_at_the_limit_they_are_not(
    tmp_path: Path, at_limit: bool
) -> None:
    config = make_config(tmp_path, batching={"prompts_per_update": ROUND, "max_staleness": 1})
    with FakeSGLang() as first, FakeSGLang(version="2") as second:
        run = make_run([first.url], config)
        collect_groups(run)
        run.progress.step = 1 if at_limit else 2
        serve(run, second.url)
        collect_groups(run)
    stale = 0 if at_limit else ROUND
    assert (run.replica.books.ledger.dropped[DropReason.STALE], run.tally["stale"]) == (stale, stale)
    assert len(run.replica.queues) == ROUND
    assert run.accounts.balance(run.progress.batch).difference == 0


def test_the_groups_of_an_open_batch_wait_for_their_updates(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path))
        collect_groups(run)
    run.progress.batch = RolloutBatch(orders=(0, 1), groups=tuple(run.replica.queues.take([0, 1])))
    found = run.accounts.balance(run.progress.batch)
    assert (found.open.waiting, found.open.in_flight, found.difference) == (ROUND, 0, 0)


def test_prompts_that_are_too_long_are_draws_and_count_as_such(tmp_path: Path) -> None:
    run = make_run([NOWHERE], make_config(tmp_path), prompts=Prompts(too_long=[1, 4]))
    draws = leader_of(run).draws
    assert [prompt.order for prompt in draws.take(6)] == [0, 2, 3, 5]
    assert (draws.cursor, draws.ledger.drawn) == (6, 6)
    assert draws.ledger_with_left_out().dropped[DropReason.TOO_LONG] == 2
    found = run.accounts.balance(run.progress.batch)
    assert found.ledger.dropped[DropReason.TOO_LONG] == run.tally["dropped_prompts"] == 2
    assert run.replica.books.outcomes.seen == 2
    assert found.difference == 4, "the draws of no collection"


def test_prompts_and_traces_that_draws_left_out_are_three_counts(tmp_path: Path) -> None:
    run = make_run([NOWHERE], make_config(tmp_path))
    left_out = leader_of(run).draws.left_out
    left_out += [DropCounts(too_long=(1, 2), traces=3, wrong_traces=5), DropCounts(traces=10)]
    run.accounts.balance(run.progress.batch)
    assert [run.tally[name] for name in ("dropped_prompts", "dropped_traces", "wrong_traces")] == [2, 13, 5]
    assert not left_out


@pytest.mark.parametrize(("start", "count", "shard", "own"), [(0, 7, 0, 3), (0, 7, 2, 2), (5, 4, 1, 1), (4, 2, 0, 0)])
def test_a_replica_draws_its_own_share(start: int, count: int, shard: int, own: int) -> None:
    draws = Draws(source=Prompts(), ledger=Ledger(), replica=shard, replicas=3, cursor=start)
    prompts = draws.take(count)
    assert len(prompts) == draws.ledger.drawn == own
    assert all(prompt.order % 3 == shard for prompt in prompts)
    assert draws.cursor == start + count


def test_draws_that_were_in_flight_at_a_checkpoint_are_of_the_replica_whose_turn_they_are() -> None:
    for replica, own in ((0, [2, 6]), (1, [3])):
        draws = Draws(source=Prompts(too_long=[5]), ledger=Ledger(), replica=replica, replicas=2)
        draws.resume(9, [2, 3, 5, 6])
        assert [prompt.order for prompt in draws.unfinished] == own
        assert draws.cursor == 9
        assert draws.ledger.drawn == 0, "the run before has drawn them"
        assert sum(left_out.prompts for left_out in draws.left_out) == replica


@pytest.mark.parametrize("rollout", [{}, {"mode": "async"}, {"oversample": 1.5}])
def test_draws_of_the_run_before_come_first_and_are_graded_once(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout))
        draws = leader_of(run).draws
        draws.ledger.draw(2)
        draws.resume(9, [3, 7])
        collect_groups(run)
        run.servers.stream.stop()
    orders = [group[0].order for group in run.replica.queues.groups()]
    assert {3, 7} <= set(orders)
    assert len(orders) == len(set(orders))
    assert draws.unfinished == []
    assert run.accounts.balance(run.progress.batch).difference == 0


def test_samples_and_outcomes_are_of_the_collection_and_the_step_to_come(tmp_path: Path) -> None:
    with FakeSGLang() as first, FakeSGLang(version="1") as second:
        run = make_run([first.url], make_config(tmp_path))
        for step, fake in enumerate((first, second)):
            run.progress.step = step
            serve(run, fake.url)
            run.replica.queues.waiting = {treatment: [] for treatment in run.replica.queues.waiting}
            collect_groups(run)
            assert run.replica.books.outcomes.graded == ROUND
    files = sorted(path.name for path in (tmp_path / "samples").glob("*.jsonl"))
    assert files == ["step_000001.jsonl", "step_000002.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "samples" / files[1]).read_text().splitlines()]
    assert {row["step"] for row in rows} == {2}


@pytest.mark.parametrize(("tier", "traces", "expected"), [
    (Tier.EASY, ("a",), False),
    (Tier.MID, (), True),
    (Tier.HARD, ("a",), True),
    (Tier.HARD, (), False),
    (None, ("a",), False),
])  # fmt: skip
def test_a_group_is_of_use_where_it_will_wait_in_a_queue(
    tier: Tier | None, traces: tuple[str, ...], expected: bool
) -> None:
    objective = build_objective(ObjectiveConfig())
    assert will_learn_from(replace(graded(0, [False], traces=traces), tier=tier), objective, 0) is expected


@pytest.mark.parametrize(("lost", "is_said"), [(1, False), (2, True)])
def test_losses_are_said_where_they_are_more_than_a_quarter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int, is_said: bool
) -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        return "500" if body["input_ids"][-1] < 100 + lost else "ok"

    with FakeSGLang(plan) as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        run = make_run([fake.url], make_config(tmp_path, batching={"prompts_per_update": 2}))
        collect_groups(run)
    assert ("prompts could not be used" in caplog.text) is is_said


@pytest.mark.parametrize("rollout", [{}, {"oversample": 1.5}])
def test_a_batch_that_stays_short_is_said_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rollout: dict[str, Any]
) -> None:
    config = make_config(tmp_path, rollout=rollout, batching={"prompts_per_update": ROUND, "max_collect_rounds": 1})
    with FakeSGLang() as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        run = make_run([fake.url], config, judge=lambda row, n: right(row, n) if row % 4 else mixed(row, n))
        collect_groups(run)
        short = caplog.text
        caplog.clear()
        collect_groups(make_run([fake.url], config, judge=mixed))
    assert f"of {ROUND} prompts to learn from after" in short
    assert "the limit of batching.max_collect_rounds=1" in short
    assert "Easy" in short
    assert not caplog.text


def test_looks_of_replicas_add_up_but_for_what_they_share() -> None:
    end = RunEnded(Cause.SERVERS_GONE, "gone")
    one = Look(waiting=1, without_logprobs=2, unserved=0, outcomes=Outcomes(graded=3), num_prompts=PROMPTS)
    other = Look(
        waiting=10, without_logprobs=20, unserved=1, outcomes=Outcomes(graded=30), num_prompts=PROMPTS, failure=end
    )
    for total in (one + other, other + one):
        assert (total.waiting, total.without_logprobs, total.unserved, total.outcomes.graded) == (11, 22, 1, 33)
        assert (total.num_prompts, total.failure) == (PROMPTS, end)


def test_a_second_round_is_collected_only_while_the_first_is_not_enough(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        enough = make_run([fake.url], make_config(tmp_path / "a"), judge=mixed)
        collect_groups(enough)
        config = make_config(tmp_path / "b", batching={"prompts_per_update": ROUND, "max_collect_rounds": 3})
        short = make_run([fake.url], config, judge=lambda row, n: right(row, n) if row % 2 else mixed(row, n))
        collect_groups(short)
    assert (enough.tally["max:rounds"], leader_of(enough).draws.cursor) == (1, ROUND)
    assert (short.tally["max:rounds"], leader_of(short).draws.cursor) == (2, 2 * ROUND)


def test_an_asynchronous_run_begins_the_groups_of_the_next_batch(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}))
        collect_groups(run)
        try:
            wait_until(lambda: len(fake.requests) >= 2 * ROUND, "the next batch is begun")
        finally:
            run.servers.stream.stop()


def test_rollouts_without_a_verdict_are_losses_that_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FakeSGLang() as fake, caplog.at_level("WARNING", logger="megatron_dypo"):
        config = make_config(tmp_path, batching={"prompts_per_update": 2})
        run = make_run([fake.url], config, judge=lambda row, n: silent(row, n) if row < 2 else mixed(row, n))
        collect_groups(run)
    assert "2 of 4 prompts could not be used: 2 without a verdict" in caplog.text


def test_a_stream_that_lost_its_servers_gets_a_refit_and_goes_on(tmp_path: Path) -> None:
    with FakeSGLang(version="0") as fake:
        refitter = NextServer([fake.url] * 9)
        config = make_config(tmp_path, rollout={"mode": "async"})
        run = make_run([closed_url()], config, refitter=refitter)
        collect_groups(run)
        run.servers.stream.stop()
    assert refitter.refitted
    assert len(run.replica.queues) >= ROUND


def test_a_stream_whose_groups_nobody_takes_draws_no_more_than_two_batches(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}), judge=right)
        stream = run.servers.stream
        stream.want(ROUND)
        stream.start()
        stream.wait(20.0, useful=10**9, resolved=2 * ROUND)
        stream.wait(0.5, useful=10**9, resolved=2 * ROUND + 1)
        done, _ = stream.take()
        stream.stop()
    assert len(done) == 2 * ROUND, "every group is Easy, so what is wanted is never there"


def test_the_progress_of_a_collection_is_what_waits_to_be_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(row: int, member: int) -> Verdict:
        return mixed(row, member) if row == 0 else right(row, member)

    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}), judge=judge)
        collect_groups(run)
        run.servers.stream.stop()
    waiting = len(run.replica.queues)
    assert 0 < waiting < ROUND
    assert f"rollouts: {waiting}/{ROUND} prompts to learn from" in capsys.readouterr().err
