"""Whole runs of the loop without Megatron: fake servers over real sockets, ranks in threads, no model in the policy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig, OldLogpConfig, ReferenceConfig
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.resume import restore_batch, restore_draws
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.train import train_run
from megatron_dypo.types import DropReason, Treatment, Verdict
from tests.support.fake_sglang import FakeSGLang, Plan
from tests.support.loop_cases import (
    PROMPTS,
    ROUND,
    FakePolicy,
    NextServer,
    OneRank,
    Prompts,
    Records,
    Refits,
    aime,
    leader_of,
    make_config,
    make_run,
    make_step,
    mixed,
    right,
    run_in_threads,
    wrong,
)
from tests.support.present import present

MODES: list[dict[str, Any]] = [{}, {"mode": "async"}, {"oversample": 1.5}]
WORLDS = {"one replica": (1, 1), "two replicas": (2, 1), "two replicas of two ranks": (4, 2)}
TRAINER: dict[str, Any] = {
    "old_logp": OldLogpConfig(source="trainer"),
    "objective": ObjectiveConfig(importance=ImportanceConfig(cap=2.0)),
}
"""Settings for log-probs by the policy; an asynchronous run then must correct for the mismatch."""


class Ended:
    """One rank's run, and how it ended."""

    def __init__(self, run: Run, end: RunEnded | None) -> None:
        self.run, self.cause = run, end.cause if end else None
        self.message = str(end)

    @property
    def policy(self) -> FakePolicy:
        assert isinstance(self.run.policy, FakePolicy)
        return self.run.policy

    @property
    def refitted(self) -> list[int]:
        refitted: list[int] = self.run.servers.refitter.refitted  # type: ignore[union-attr]
        return refitted

    @property
    def released(self) -> int:
        """Number of times that the servers were told to release memory."""
        released: int = self.run.servers.refitter.released  # type: ignore[union-attr]
        return released

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        assert isinstance(self.run.writer, Records)
        return self.run.writer.metrics


def train(
    config: Config,
    *,
    judge: Callable[[int, int], Verdict] = mixed,
    plan: Plan = lambda index, body: "ok",
    world: tuple[int, int] = (1, 1),
    prompts: Prompts | None = None,
    refitter: Any = None,
    policy: Callable[[bool], FakePolicy] = lambda is_leader: FakePolicy(is_leader=is_leader),
) -> list[Ended]:
    """Train on each rank of (ranks, ranks of a replica). All ask one fake server; the first rank sets its version."""
    size, ranks_per_replica = world
    with FakeSGLang(plan) as fake:

        def work(ranks: Any) -> Ended:
            refits = refitter or Refits(fakes=[fake] if ranks.is_global_leader else [], urls=[fake.url])
            is_leader = getattr(ranks, "is_leader", True)
            run = make_run(
                [fake.url], config, judge=judge, prompts=prompts, ranks=ranks, refitter=refits, policy=policy(is_leader)
            )
            try:
                train_run(run)
            except RunEnded as end:
                return Ended(run, end)
            finally:
                run.servers.stream.stop()
            return Ended(run, None)

        return run_in_threads(size, work, ranks_per_replica)


def orders_of(updates: list[list[Any]]) -> list[list[int]]:
    return [sorted({sample.order for sample in samples}) for samples in updates]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("rollout", MODES, ids=["sync", "async", "oversample"])
def test_a_run_makes_its_steps_on_all_ranks_alike_and_its_books_balance(
    tmp_path: Path, rollout: dict[str, Any], world: tuple[int, int]
) -> None:
    ranks = train(make_config(tmp_path, steps=4, rollout=rollout, batching={"updates_per_batch": 2}), world=world)
    assert [(ended.cause, ended.run.progress.step, ended.refitted) for ended in ranks] == [
        (None, 4, [0, 2, 4])
    ] * world[0]
    assert {ended.released for ended in ranks} == {2}, "once a rollout batch, before its log-probs"
    first = ranks[0]
    for step in range(4):
        entered = [{s.order for s in ended.policy.updates[step]} for ended in ranks]
        assert sum(map(len, entered)) == len(set().union(*entered)) == ROUND, (
            "each group is on one replica, and enters once"
        )
        for ended, orders in zip(ranks, entered, strict=True):
            assert all(order % ended.run.ranks.replicas == ended.run.ranks.replica for order in orders)
    assert [
        sum(first.metrics[step][f"ledger/{name}"] for name in ("trained_rl", "trained_sft")) for step in (1, 2, 3, 4)
    ] == [4, 8, 12, 16]
    balance = [first.metrics[step] for step in (1, 2, 3, 4)][-1]
    ends = sum(count for name, count in balance.items() if name.startswith("ledger/") and name != "ledger/drawn")
    assert balance["ledger/drawn"] == ends
    assert [sorted(ended.policy.saved) for ended in ranks] == [[4]] * world[0]
    assert [len(ended.policy.exported) for ended in ranks] == [1] * world[0]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_synchronous_run_has_log_probs_of_the_weights_that_sampled(tmp_path: Path, world: tuple[int, int]) -> None:
    """Three of four prompts enter each step; the others wait with the log-probs that they got when they came in."""
    config = make_config(tmp_path, steps=4, batching={"prompts_per_update": 3, "max_staleness": 9}, **TRAINER)
    ranks = train(config, world=world)
    entered = [(step, s) for ended in ranks for step, samples in enumerate(ended.policy.updates) for s in samples]
    for step, sample in entered:
        assert sample.logp_version == sample.policy_version <= step
        assert set(present(sample.old_logp)) == {-1.0 - sample.policy_version}
        now = None if sample.policy_version == step else (-1.0 - step) * sample.num_response_tokens
        assert sample.current_logp_sum == now
    assert any(sample.policy_version < step for step, sample in entered)
    first = [sorted(set(orders)) for version, orders in ranks[0].policy.asked if version == 0]
    assert first[0] == [order for order in range(ROUND) if order % ranks[0].run.ranks.replicas == 0], "all that came in"


def test_an_asynchronous_run_has_log_probs_of_the_weights_that_begin_its_batch(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        steps=6,
        rollout={"mode": "async"},
        batching={"updates_per_batch": 2, "prompts_per_update": 2},
        **TRAINER,
    )
    (ended,) = train(config)
    for step, samples in enumerate(ended.policy.updates):
        assert {sample.logp_version for sample in samples} == {step - step % 2}
        assert all(set(present(sample.old_logp)) == {-1.0 - (step - step % 2)} for sample in samples)
        assert all((sample.current_logp_sum is None) == (step % 2 == 0) for sample in samples)


def test_the_reference_is_read_where_it_has_weights_and_refreshed_when_it_is_due(tmp_path: Path) -> None:
    reference = ReferenceConfig(mode="refreshed", refresh_every=2)
    config = make_config(
        tmp_path, steps=4, objective=ObjectiveConfig(reference=reference), old_logp=TRAINER["old_logp"]
    )
    (ended,) = train(config, policy=lambda is_leader: FakePolicy(keeps_reference=True))
    assert ended.policy.refreshed == [2, 4]
    assert {float(logp) for samples in ended.policy.updates for s in samples for logp in present(s.ref_logp)} == {-0.5}
    (plain,) = train(replace(config, objective=ObjectiveConfig()))
    assert all((present(s.ref_logp) == present(s.old_logp)).all() for samples in plain.policy.updates for s in samples)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_dropped_groups_are_accounted_for_and_the_run_goes_on(tmp_path: Path, world: tuple[int, int]) -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        return {103: "500", 104: "400"}.get(body["input_ids"][-1], "ok")

    ranks = train(make_config(tmp_path, steps=3, batching={"prompts_per_update": 3}), plan=plan, world=world)
    last = ranks[0].metrics[3]
    assert (last["ledger/dropped_incomplete"], last["ledger/dropped_refused"]) == (1.0, 1.0)
    assert all(ended.cause is None for ended in ranks)
    assert not {3, 4} & {order for ended in ranks for orders in orders_of(ended.policy.updates) for order in orders}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("rollout", MODES, ids=["sync", "async", "oversample"])
def test_all_easy_leaves_nothing_to_learn_on_any_rank(
    tmp_path: Path, rollout: dict[str, Any], world: tuple[int, int]
) -> None:
    ranks = train(make_config(tmp_path, rollout=rollout), judge=right, world=world)
    assert {ended.cause for ended in ranks} == {Cause.NOTHING_LEFT}
    assert len({ended.message for ended in ranks}) == 1
    assert all(not ended.policy.updates and not ended.policy.saved and not ended.policy.exported for ended in ranks)
    assert (
        ranks[0].metrics[1]["ledger/dropped_easy"]
        == ranks[0].metrics[1]["ledger/drawn"] - ranks[0].metrics[1]["ledger/in_flight"]
    )


@pytest.mark.parametrize("rollout", MODES, ids=["sync", "async", "oversample"])
def test_all_hard_is_distilled_and_needs_no_log_probs(tmp_path: Path, rollout: dict[str, Any]) -> None:
    (ended,) = train(make_config(tmp_path, steps=2, rollout=rollout, **TRAINER), judge=wrong)
    assert {s.treatment for samples in ended.policy.updates for s in samples} == {Treatment.DISTILL}
    assert {s.logp_version for samples in ended.policy.updates for s in samples} == {None}
    assert not any(orders for _, orders in ended.policy.asked)


def test_a_run_that_has_learned_all_there_is_saves_and_exports(tmp_path: Path) -> None:
    seen: set[int] = set()

    def judge(row: int, member: int) -> Verdict:
        is_new = row not in seen
        if member == 1:
            seen.add(row)
        return mixed(row, member) if is_new else right(row, member)

    (ended,) = train(make_config(tmp_path), judge=judge)
    assert ended.cause is Cause.NOTHING_LEFT
    steps = PROMPTS // ROUND
    assert (ended.run.progress.step, sorted(ended.policy.saved), len(ended.policy.exported)) == (steps, [steps], 1)
    assert ended.metrics[steps + 1]["gate/easy"] == 1.0


@pytest.mark.parametrize("rollout", [{}, {"mode": "async"}], ids=["sync", "async"])
def test_a_refit_in_the_middle_of_a_collection_brings_the_other_server_and_the_run_goes_on(
    tmp_path: Path, rollout: dict[str, Any]
) -> None:
    with (
        FakeSGLang(lambda index, body: "ok" if index < 2 else "die", version="0") as one,
        FakeSGLang(version="0") as two,
    ):
        refitter = NextServer([one.url, *[two.url] * 9])
        (ended,) = train(make_config(tmp_path, steps=1, rollout=rollout | {"retries": 9}), refitter=refitter)
    assert ended.cause is None
    assert refitter.refitted[:2] == [0, 0], "the same version again"
    assert refitter.refitted[-1] == 1
    assert ended.run.progress.step == 1
    assert two.requests
    assert ended.metrics[1]["ledger/dropped_incomplete"] == 0


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("async_save", "published"), [(False, [2, 4, 5]), (True, [3, 5, 5])])
def test_an_asynchronous_save_is_published_in_a_later_step_and_the_last_one_at_once(
    tmp_path: Path, async_save: bool, published: list[int], world: tuple[int, int]
) -> None:
    checkpoint = CheckpointConfig(every=2, keep=9, async_save=async_save)
    ranks = train(make_config(tmp_path, steps=5, checkpoint=checkpoint), world=world)
    assert [ended.policy.published for ended in ranks] == [list(zip([2, 4, 5], published, strict=True))] * world[0]
    for step, saved in ranks[0].policy.saved.items():
        assert saved["trainer_state"]["batches"] == step, "the state of its own step"


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_that_ends_early_publishes_what_it_has_begun_to_save(tmp_path: Path, async_save: bool) -> None:
    def policy(is_leader: bool) -> FakePolicy:
        made = FakePolicy(is_leader=is_leader)
        made.bad_updates = {1, 2, 3}
        return made

    checkpoint = CheckpointConfig(every=1, keep=9, async_save=async_save)
    (ended,) = train(make_config(tmp_path, checkpoint=checkpoint), policy=policy)
    assert ended.cause is Cause.NOT_FINITE
    assert sorted(ended.policy.saved) == [1]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_updates_that_are_skipped_end_the_run_on_all_ranks_when_they_are_too_many(
    tmp_path: Path, world: tuple[int, int]
) -> None:
    def policy(is_leader: bool) -> FakePolicy:
        made = FakePolicy(is_leader=is_leader)
        made.bad_updates = {0, 1, 3, 4, 5}
        return made

    ranks = train(make_config(tmp_path, checkpoint=CheckpointConfig(every=1, keep=9)), policy=policy, world=world)
    assert {ended.cause for ended in ranks} == {Cause.NOT_FINITE}
    assert ranks[0].message.startswith(
        "step 6: 3 updates in a row were skipped: the first that is not finite: gradient"
    )
    assert {ended.run.progress.step for ended in ranks} == {6}
    assert sorted(ranks[0].policy.saved) == [3], "no checkpoint while updates are skipped"


def spoilt_at_3(is_leader: bool) -> FakePolicy:
    """Return a policy whose third update makes a weight that is not finite, of gradients that are."""
    made = FakePolicy(is_leader=is_leader, keeps_reference=True)
    made.spoilt_at = 3
    return made


@pytest.mark.parametrize("every", [1, 2, 0], ids=["each step", "every second step", "the last alone"])
def test_a_weight_that_an_update_spoils_reaches_no_server_no_checkpoint_and_no_export(
    tmp_path: Path, every: int
) -> None:
    config = make_config(tmp_path, steps=5, checkpoint=CheckpointConfig(every=every, keep=9), eval=aime(every=3))
    ranks = train(config, policy=spoilt_at_3, world=(2, 1))
    assert {ended.cause for ended in ranks} == {Cause.NOT_FINITE}
    assert {ended.message for ended in ranks} == {"step 3, after its update: weight w holds a value that is not finite"}
    assert [ended.refitted for ended in ranks] == [[0, 1, 2]] * 2
    assert ranks[0].metrics[3]["train/skipped"] == 0.0, "the update was made"
    assert "eval/aime/accuracy" not in ranks[0].metrics[3]
    assert sorted(ranks[0].policy.saved) == [step for step in range(1, 3) if every and step % every == 0]
    assert ranks[0].policy.exported == []


OF_FIVE = {"updates_per_batch": 5, "prompts_per_update": 1}


def test_a_weight_that_is_not_finite_is_found_before_a_checkpoint_inside_a_batch(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=5, checkpoint=CheckpointConfig(every=1, keep=9), batching=OF_FIVE)
    ranks = train(config, policy=spoilt_at_3, world=(2, 1))
    assert {ended.message for ended in ranks} == {
        "step 3, before its checkpoint: weight w holds a value that is not finite"
    }
    assert {ended.cause for ended in ranks} == {Cause.NOT_FINITE}
    assert sorted(ranks[0].policy.saved) == [1, 2]
    assert ranks[0].refitted == [0]


def test_weights_that_are_not_finite_do_not_become_the_reference(tmp_path: Path) -> None:
    objective = ObjectiveConfig(kl_coef=0.1, reference=ReferenceConfig(mode="refreshed", refresh_every=1))
    config = make_config(tmp_path, steps=5, objective=objective, batching=OF_FIVE)
    (ended,) = train(config, policy=spoilt_at_3)
    assert ended.message == "step 3, after its update: weight w holds a value that is not finite"
    assert ended.policy.refreshed == [1, 2]


def test_the_weights_are_evaluated_before_the_first_step_when_it_is_due_and_after_the_last(tmp_path: Path) -> None:
    settings = aime(every=2)
    config = make_config(tmp_path, steps=5, eval=settings, batching={"updates_per_batch": 5, "prompts_per_update": 1})
    (ended,) = train(config)
    assert [step for step, metrics in ended.metrics.items() if "eval/aime/accuracy" in metrics] == [0, 2, 4, 5]
    assert ended.refitted == [0, 2, 4, 5], "the weights of an open batch are served for an evaluation alone"


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_that_stopped_inside_a_batch_goes_on_with_its_next_minibatch(tmp_path: Path, replicas: int) -> None:
    """With any number of replicas, the minibatches are those of the run that was not stopped."""
    batching = {"updates_per_batch": 2, "prompts_per_update": 2, "epochs_per_batch": 2}
    config = make_config(tmp_path, steps=6, batching=batching, checkpoint=CheckpointConfig(every=1, keep=9))
    (whole,) = train(config)
    expected = orders_of(whole.policy.updates)
    assert expected[:4] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    for step in (1, 2, 3):
        found = [
            resumed(config, whole.policy.saved[step], step, OneRank(replica=r, replicas=replicas))
            for r in range(replicas)
        ]
        for later in range(4 - step):
            entered = sorted(order for updates in found for order in orders_of(updates)[later])
            assert entered == expected[step + later]


def resumed(config: Config, saved: dict[str, Any], step: int, ranks: OneRank) -> list[list[Any]]:
    """Make the remaining updates of a batch, on a replica that asks no server for them."""
    run = make_run(["http://127.0.0.1:9"], config, ranks=ranks)
    leader, state = leader_of(run), saved["trainer_state"]
    restore_draws(leader.draws, state)
    leader.books.ledger = leader.draws.ledger
    stored = Stored(trainer_state=state, leader_states=saved["leader_states"])
    run.progress.batch = restore_batch(stored, leader, Path("checkpoint"))
    run.progress.step, run.progress.batches = step, state["batches"]
    while not run.progress.batch.is_used_up:
        make_step(run)
    assert run.ranks.replicas > 1 or run.accounts.balance(run.progress.batch).difference == 0
    assert isinstance(run.policy, FakePolicy)
    return run.policy.updates


class Stored:
    """A checkpoint in memory."""

    def __init__(self, trainer_state: dict[str, Any], leader_states: list[bytes]) -> None:
        self.trainer_state, self.leader_states = trainer_state, leader_states


def test_the_samples_of_a_step_are_written_for_people(tmp_path: Path) -> None:
    train(make_config(tmp_path, steps=2), judge=lambda row, n: right(row, n) if row == 1 else mixed(row, n))
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert {row["prompt_id"]: row["dropped"] for row in rows}["p1"] == DropReason.EASY.value


def test_the_loop_imports_no_megatron() -> None:
    """So its tests need no Megatron: a fake policy takes its place."""
    program = (
        "import sys, megatron_dypo.loop.train, megatron_dypo.loop.state, megatron_dypo.loop.setup.background\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "[]"
