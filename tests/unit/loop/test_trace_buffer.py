"""Buffered traces in the loop: they get an update of their own once there are enough, also after a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.batching.queues import Queues
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.loop.resume import restore_batch, restore_draws
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.train import train_run
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.types import Sample, SampleKind, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import (
    ROUND,
    FakePolicy,
    Records,
    Refits,
    leader_of,
    make_config,
    make_run,
    make_step,
    run_in_threads,
)  # fmt: skip

SIZE = 6


def relift(size: int = SIZE, keeps: int = 100) -> ObjectiveConfig:
    options = {"buffer_size": size, "buffer_keeps": keeps, "buffer_entropy_coef": 0.5}
    return ObjectiveConfig(name="relift", options=options, entropy_coef=0.25)


def judge(row: int, member: int) -> Verdict:
    """Judge: row 0 is Mid; all others are Hard."""
    is_right = row == 0 and member == 0
    return Verdict(is_correct=is_right, reward=float(is_right))


def config_of(tmp_path: Path, steps: int, objective: ObjectiveConfig | None = None, **sections: Any) -> Any:
    checkpoint = CheckpointConfig(every=1, keep=99)
    return make_config(tmp_path, steps=steps, objective=objective or relift(), checkpoint=checkpoint, **sections)


def kinds(update: list[Sample]) -> tuple[list[int], set[SampleKind]]:
    return sorted({sample.order for sample in update}), {sample.kind for sample in update}


def train(config: Any, fake: FakeSGLang) -> tuple[Run, Refits]:
    refits = Refits(urls=[fake.url], fakes=[fake])
    run = make_run([fake.url], config, judge=judge, refitter=refits, policy=FakePolicy())
    train_run(run)
    run.servers.stream.stop()
    return run, refits


def updates_of(run: Run) -> list[list[Sample]]:
    assert isinstance(run.policy, FakePolicy)
    return run.policy.updates


def test_an_update_on_the_newest_traces_follows_the_batch_that_finds_enough_of_them(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run, refits = train(config_of(tmp_path, 4), fake)
    first, second, own, _ = updates_of(run)
    assert kinds(first) == ([0, 1, 2, 3], {SampleKind.ROLLOUT})
    assert kinds(second) == ([4, 5, 6, 7], {SampleKind.ROLLOUT})
    # Rows 1, 2, 3 and 4 to 7 are Hard. Of these seven the newest six are taken.
    assert kinds(own) == ([2, 3, 4, 5, 6, 7], {SampleKind.TRACE})
    share = 1 / (SIZE * 2)
    for sample in own:
        assert sample.weights is not None
        assert dict(sample.weights) == pytest.approx({"nll_weight": share, "entropy_weight": 0.5 * share})
    assert all("entropy_weight" in (sample.weights or {}) for sample in second)
    assert isinstance(run.writer, Records)
    metrics = run.writer.metrics
    assert [metrics[step].get("queue/buffer") for step in (1, 2, 3)] == [3, 1, 1]
    assert metrics[3]["gate/offline_share_prompts"] == 1.0
    assert [metrics[step]["ledger/trained_rl"] for step in (2, 3)] == [2 * ROUND] * 2
    assert refits.refitted == [0, 1, 3, 4], "the servers get the weights after the last update of a batch"
    assert run.accounts.balance(run.progress.batch).difference == 0


def test_traces_that_a_stream_finds_make_updates_of_their_own_too(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run, _ = train(config_of(tmp_path, 5, rollout={"oversample": 2.0}), fake)
    found = [kinds(update) for update in updates_of(run)]
    own = [number for number, (_, of_kind) in enumerate(found) if of_kind == {SampleKind.TRACE}]
    assert own
    assert all(len(found[number][0]) == SIZE for number in own)
    assert all(later - sooner > 1 for sooner, later in itertools.pairwise(own)), "one for each rollout batch at most"


def test_without_enough_traces_there_is_no_such_update(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run, _ = train(config_of(tmp_path, 4, relift(size=50)), fake)
    assert [kinds(update)[1] for update in updates_of(run)] == [{SampleKind.ROLLOUT}] * 4


def test_a_replica_keeps_the_newest_traces_and_forgets_the_oldest(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run, _ = train(config_of(tmp_path, 3, relift(size=50, keeps=50)), fake)
        # Of the 12 rows all but row 0 are Hard.
        assert [group[0].order for group in run.replica.queues.buffer] == list(range(1, 12))
    queues = Queues(buffer=list(run.replica.queues.buffer))
    assert [g[0].order for g in queues.take_buffered([10], keeps=3)] == [10]
    assert [g[0].order for g in queues.buffer] == [8, 9, 11]


def resumed(config: Any, saved: dict[str, Any], step: int, fake: FakeSGLang) -> Run:
    run = make_run([fake.url], config, judge=judge, refitter=Refits(urls=[fake.url], fakes=[fake]), policy=FakePolicy())
    leader, state = leader_of(run), saved["trainer_state"]
    restore_draws(leader.draws, state)
    leader.books.ledger = leader.draws.ledger

    class Stored:
        trainer_state = state
        leader_states = saved["leader_states"]

    run.progress.batch = restore_batch(Stored(), leader, Path("checkpoint"))
    run.progress.step, run.progress.batches = step, state["batches"]
    assert isinstance(run.policy, FakePolicy)
    run.policy.version = step
    run.servers.refit(step)
    return run


def same(one: list[Sample], other: list[Sample]) -> bool:
    def text(sample: Sample) -> dict[str, Any]:
        values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    return [text(sample) for sample in one] == [text(sample) for sample in other]


def test_a_run_that_stopped_at_any_step_makes_the_updates_that_it_would_have_made(tmp_path: Path) -> None:
    batching = {"updates_per_batch": 2, "prompts_per_update": 2}
    config = config_of(tmp_path, 8, batching=batching)
    with FakeSGLang() as fake:
        whole, _ = train(config, fake)
        assert isinstance(whole.policy, FakePolicy)
        assert [kinds(update)[1] == {SampleKind.TRACE} for update in whole.policy.updates].count(True) == 1
        for step in (1, 2, 3, 4, 5, 6):
            run = resumed(config, whole.policy.saved[step], step, fake)
            for _ in range(8 - step):
                make_step(run)
            for mine, expected in zip(updates_of(run), whole.policy.updates[step:], strict=True):
                assert same(mine, expected), step
            assert isinstance(run.policy, FakePolicy)
            assert without_digests(run.policy.saved[8]) == without_digests(whole.policy.saved[8])


def without_digests(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint without the digests of weights: a run that was resumed by hand knows fewer versions."""
    state = {key: value for key, value in saved["trainer_state"].items() if key != "weights"}
    return {**saved, "trainer_state": state}


def test_replicas_share_an_update_on_the_newest_traces_of_all(tmp_path: Path) -> None:
    def work(ranks: Any) -> list[list[Sample]]:
        config = config_of(tmp_path, 3)
        with FakeSGLang() as fake:
            policy = FakePolicy()
            run = make_run(
                [fake.url], config, judge=judge, ranks=ranks, refitter=Refits([fake.url], [fake]), policy=policy
            )
            train_run(run)
            return updates_of(run)

    replicas = run_in_threads(2, work)
    own = [sorted(sample.order for sample in updates[2]) for updates in replicas]
    assert own == [[2, 4, 6], [3, 5, 7]]
    assert {sample.kind for updates in replicas for sample in updates[2]} == {SampleKind.TRACE}
    weights = [sample.weights["nll_weight"] for updates in replicas for sample in updates[2] if sample.weights]
    assert weights == [pytest.approx(1 / (SIZE * 2))] * SIZE


def test_a_buffer_that_cannot_fill_an_update_is_refused() -> None:
    options = {"buffer_size": 10, "buffer_keeps": 9}
    with pytest.raises(ValueError, match=r"buffer_keeps=9: must be at least buffer_size=10"):
        build_objective(ObjectiveConfig(name="relift", options=options))
