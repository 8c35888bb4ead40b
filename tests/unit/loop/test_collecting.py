"""Collections against a fake server: the outcome of every draw, and the collections that end a run."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.state import Run
from megatron_dypo.processes.garbage import only_short_collections
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.types import DropReason, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import (
    PROMPTS,
    ROUND,
    Prompts,
    collect_groups,
    leader_of,
    make_config,
    make_run,
    mixed,
    right,
    silent,
    wrong,
)

MODES = [{}, {"mode": "async"}, {"oversample": 1.5}]


def collect(run: Run) -> None:
    """Collect once; stop a stream that goes on."""
    try:
        collect_groups(run)
    finally:
        run.servers.stream.stop()


def ends_with(run: Run, cause: Cause) -> str:
    with pytest.raises(RunEnded) as caught:
        collect(run)
    assert caught.value.cause is cause, str(caught.value)
    assert run.accounts.balance(run.progress.batch).difference == 0
    return str(caught.value)


def rows_of(run: Run) -> list[dict[str, Any]]:
    path = Path(run.config.run.dir) / "samples" / f"step_{run.progress.step + 1:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rollout", MODES)
def test_a_collection_fills_the_queues_and_the_books_balance(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout))
        collect(run)
    found = run.accounts.balance(run.progress.batch)
    assert found.difference == 0
    assert found.open.waiting == len(run.replica.queues) >= ROUND
    assert found.ledger.drawn == leader_of(run).draws.cursor


class Cycle:
    """An object that refers to itself: only the garbage collector frees it."""

    def __init__(self) -> None:
        self.own = self


def test_a_step_of_an_asynchronous_run_collects_the_garbage_that_the_stream_leaves(tmp_path: Path) -> None:
    with FakeSGLang() as fake, only_short_collections():
        run = make_run([fake.url], make_config(tmp_path, rollout={"mode": "async"}))
        cycle = Cycle()
        gc.collect()  # it is old now
        left = weakref.ref(cycle)
        del cycle
        assert left() is not None
        collect(run)
    assert left() is None


@pytest.mark.parametrize("rollout", MODES)
def test_every_draw_is_on_one_account(tmp_path: Path, rollout: dict[str, Any]) -> None:
    def judge(row: int, member: int) -> Verdict:
        return (right, wrong, mixed, silent)[row % 4](row, member)

    def plan(index: int, body: dict[str, Any]) -> str:
        return "500" if body["input_ids"][-1] == 100 + 6 else "ok"

    prompts = Prompts(too_long=[7], traces=[1])
    with FakeSGLang(plan) as fake:
        config = make_config(tmp_path, rollout=rollout, batching={"prompts_per_update": 3, "max_collect_rounds": 3})
        run = make_run([fake.url], config, judge=judge, prompts=prompts)
        collect(run)
    found = run.accounts.balance(run.progress.batch)
    assert found.difference == 0
    counts = found.counts()
    assert counts["drawn"] >= PROMPTS - 2
    assert counts["dropped_easy"] >= 2, "rows 0, 4 and 8"
    assert counts["dropped_no_teacher"] >= 1, "rows 5 and 9, and not row 1"
    assert counts["dropped_incomplete"] >= 1, "row 6"
    assert counts["dropped_too_long"] >= 1, "row 7"
    assert counts["dropped_no_verdict"] >= 1, "rows 3 and 11"
    reasons = {row["dropped"] for row in rows_of(run)}
    assert {None, "easy", "no_teacher", "incomplete", "no_verdict"} <= reasons


@pytest.mark.parametrize("rollout", MODES)
def test_a_collection_in_which_no_group_comes_back_ends_the_run(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang(lambda index, body: "500") as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout))
        message = ends_with(run, Cause.GROUPS_LOST)
    assert "with an incomplete group" in message
    assert "out of luck" in message, "the last reason"
    assert run.replica.books.ledger.drawn <= 3 * 2 * ROUND


@pytest.mark.parametrize("rollout", MODES)
def test_a_round_without_any_verdict_ends_the_run(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout), judge=silent)
        assert "KeyError: 'x'" in ends_with(run, Cause.NO_VERDICTS)
    assert all(row["dropped"] == "no_verdict" for row in rows_of(run))


def test_one_rollout_without_a_verdict_drops_its_group_and_no_other(tmp_path: Path) -> None:
    def judge(row: int, member: int) -> Verdict:
        return (
            silent(row, member) if (row, member) == (1, 1) else right(row, member) if row == 1 else mixed(row, member)
        )

    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, batching={"prompts_per_update": 3}), judge=judge)
        collect(run)
    assert [group[0].order for group in run.replica.queues.groups()] == [0, 2, 3]
    assert +run.replica.books.ledger.dropped == {DropReason.NO_VERDICT: 1}


@pytest.mark.parametrize("rollout", MODES)
def test_prompts_that_are_all_too_long_are_bad_input(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout), prompts=Prompts(too_long=range(PROMPTS)))
        message = ends_with(run, Cause.BAD_INPUT)
    assert "prompts are longer than data.max_prompt_tokens=1024" in message
    assert fake.requests == []


@pytest.mark.parametrize("rollout", MODES)
def test_nothing_is_left_only_when_every_prompt_was_graded(tmp_path: Path, rollout: dict[str, Any]) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout), judge=right)
        message = ends_with(run, Cause.NOTHING_LEFT)
        asked = {body["input_ids"][-1] for body in fake.requests}
    assert asked == {100 + row for row in range(PROMPTS)}, "more than max_collect_rounds allows while nothing is found"
    assert "Easy" in message


@pytest.mark.parametrize("rollout", MODES)
def test_a_prompt_beyond_the_limit_of_rounds_is_found_while_nothing_else_is(
    tmp_path: Path, rollout: dict[str, Any]
) -> None:
    def judge(row: int, member: int) -> Verdict:
        return mixed(row, member) if row == PROMPTS - 1 else right(row, member)

    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout), judge=judge)
        collect(run)
    assert PROMPTS - 1 in {group[0].order % PROMPTS for group in run.replica.queues.groups()}


def test_hard_prompts_without_traces_leave_nothing(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path), judge=wrong, prompts=Prompts(traces=()))
        message = ends_with(run, Cause.NOTHING_LEFT)
    assert message == "step 0: no trainable prompt left among 12 draws: 12 Hard without a teacher's trace"


def test_supervised_training_without_traces_has_nothing_to_learn(tmp_path: Path) -> None:
    config = make_config(tmp_path, objective=ObjectiveConfig(name="sft"))
    run = make_run(["http://127.0.0.1:9"], config, prompts=Prompts(traces=()))
    ends_with(run, Cause.NOTHING_LEFT)


@pytest.mark.parametrize("rollout", MODES)
def test_servers_that_died_for_good_end_the_run_on_all_ranks(tmp_path: Path, rollout: dict[str, Any]) -> None:
    def gone() -> None:
        raise ServerDiedError("SGLang server 0 ended with status 137")

    with FakeSGLang(lambda index, body: "hang") as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout), check=gone)
        assert ends_with(run, Cause.SERVERS_GONE) == "SGLang server 0 ended with status 137"


def test_what_waited_for_too_long_is_stale_in_the_books(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], make_config(tmp_path, batching={"prompts_per_update": ROUND, "max_staleness": 0}))
        collect(run)
        assert run.accounts.balance(run.progress.batch).open.waiting == ROUND
        run.replica.queues.drop_stale(1, 0)
    assert run.accounts.balance(run.progress.batch).difference == ROUND, "draws that nobody entered are noticed"


def test_a_group_of_weights_that_are_too_old_never_enters_the_queues(tmp_path: Path) -> None:
    with FakeSGLang(version="1") as fake:
        config = make_config(tmp_path, batching={"prompts_per_update": 2, "max_staleness": 1, "max_collect_rounds": 1})
        run = make_run([fake.url], config)
        run.progress.step = 5
        with pytest.raises(RunEnded):
            collect(run)
    assert run.replica.books.ledger.dropped[DropReason.STALE] == ROUND
    assert run.accounts.balance(run.progress.batch).difference == 0
