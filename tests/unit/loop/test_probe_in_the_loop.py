"""The probe in the loop: its samples, one file from several replicas, and the steps at which it happens."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.probe import ProbeReport, probe
from megatron_dypo.loop.train import train_step
from megatron_dypo.metrics.names import lookup
from megatron_dypo.planning.probe import host_bytes
from megatron_dypo.probe.scores import Scores, load
from megatron_dypo.types import Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import (
    FakePolicy,
    Prompts,
    Refits,
    ThreadRanks,
    leader_of,
    make_config,
    make_run,
    mixed,
    run_in_threads,
    silent,
)

PROMPTS, REPEATS, GROUP, SIZE = 5, 3, 2, 16
CFG = ProbeConfig(every=2, prompts=PROMPTS, repeats=REPEATS, dimension=SIZE)


def run_of(folder: Path, fake: FakeSGLang, judge: Any = mixed, *, ranks: Any = None, **sections: Any) -> Any:
    config = make_config(folder, probe=CFG, **sections)
    policy = FakePolicy(keeps_reference=True, is_leader=getattr(ranks, "is_leader", True))
    return make_run([fake.url], config, judge=judge, ranks=ranks, policy=policy, refitter=Refits(fakes=[fake]))


def probed(folder: Path, judge: Any = mixed, **sections: Any) -> tuple[ProbeReport, Scores]:
    with FakeSGLang() as fake:
        report = probe(run_of(folder, fake, judge, **sections).prober, 4)
        assert [body["sampling_params"]["n"] for body in fake.requests] == [REPEATS * GROUP] * PROMPTS
    return report, load(folder / "probe" / "step_000004.npz")


def test_all_rollouts_and_traces_of_the_first_prompts_are_kept(tmp_path: Path) -> None:
    report, scores = probed(tmp_path)
    assert scores.prompt_ids == tuple(f"p{row}" for row in range(PROMPTS))
    assert scores.teachers == ("teacher",)
    assert scores.step == 4
    assert scores.score_Nd.shape == (PROMPTS * (REPEATS * GROUP + 1), SIZE)
    for prompt in range(PROMPTS):
        mine = scores.prompt_N == prompt
        assert sorted(scores.repeat_N[mine]) == [-1, 0, 0, 1, 1, 2, 2]
        assert scores.is_correct_N[mine].sum() == 1, "the verifier finds the first rollout right"
    # Under the weights of now a token has −1, under the reference −0.5; a rollout has three tokens, a trace two.
    assert np.allclose(scores.log_ratio_N["frozen"], -0.5 * scores.length_N)
    assert not scores.log_ratio_N["old"].any()
    result = json.loads((tmp_path / "probe" / "step_000004.json").read_text())
    assert result["step"] == 4
    assert result["cost"]["trajectories"] == len(scores.length_N)
    for name in report.metrics:
        lookup(name)
    assert report.metrics["probe/seconds"] > 0


def test_a_probe_takes_no_prompt_from_the_run(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = run_of(tmp_path, fake)
        probe(run.prober, 0)
        assert leader_of(run).draws.cursor == 0
        assert leader_of(run).draws.ledger.as_json() == leader_of(run_of(tmp_path, fake)).draws.ledger.as_json()


def test_two_replicas_write_the_file_of_one(tmp_path: Path) -> None:
    _, alone = probed(tmp_path / "one")
    with FakeSGLang() as fake:

        def work(ranks: ThreadRanks) -> ProbeReport:
            return probe(run_of(tmp_path / "two", fake, ranks=ranks).prober, 4)

        first, second, third, fourth = run_in_threads(4, work, ranks_per_replica=2)
    assert first.metrics
    assert second.metrics == third.metrics == fourth.metrics == {}
    assert first.moments == second.moments == third.moments == fourth.moments
    together = load(tmp_path / "two" / "probe" / "step_000004.npz")
    assert together.prompt_ids == alone.prompt_ids
    for name in ("score_Nd", "prompt_N", "repeat_N", "teacher_N", "is_correct_N", "length_N"):
        assert np.array_equal(getattr(together, name), getattr(alone, name)), name
    assert sorted(path.name for path in (tmp_path / "two" / "probe").iterdir()) == [
        "step_000004.json",
        "step_000004.npz",
    ]


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_host_holds_as_much_as_the_plan_says(replicas: int, tmp_path: Path) -> None:
    import megatron_dypo.probe.result  # noqa: F401, before the start: imports do not count

    size = 2**16
    with FakeSGLang() as fake:

        def work(ranks: ThreadRanks) -> ProbeReport:
            prober = run_of(tmp_path, fake, ranks=ranks).prober
            return probe(dataclasses.replace(prober, cfg=dataclasses.replace(CFG, dimension=size)), 4)

        tracemalloc.start()
        try:
            run_in_threads(replicas, work)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    planned = host_bytes(PROMPTS, REPEATS * GROUP, 1, size, is_joined=replicas > 1)
    assert 0.85 * planned < peak < 1.1 * planned


def test_a_prompt_without_all_its_verdicts_is_left_out(tmp_path: Path) -> None:
    def judge(row: int, member: int) -> Verdict:
        return silent(row, member) if row == 1 else mixed(row, member)

    _, scores = probed(tmp_path, judge)
    assert scores.prompt_ids == ("p0", "p2", "p3", "p4")


def test_with_fewer_than_three_prompts_the_run_ends_and_says_so(tmp_path: Path) -> None:
    with FakeSGLang() as fake, pytest.raises(RunEnded, match="probe: only 0 of 5 prompts") as end:
        probe(run_of(tmp_path, fake, silent).prober, 4)
    assert end.value.cause is Cause.NO_VERDICTS


def test_a_run_goes_on_if_too_few_of_its_first_prompts_can_be_probed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeSGLang() as fake:
        config = make_config(tmp_path, probe=dataclasses.replace(CFG, every=1))
        prompts = Prompts(too_long=range(PROMPTS - 2))
        run: Any = make_run(
            [fake.url], config, prompts=prompts, policy=FakePolicy(keeps_reference=True), refitter=Refits(fakes=[fake])
        )
        run.servers.refit(0)
        train_step(run.progress, run.collector, run.updater, run.evaluator, run.prober, run.recorder)
    assert run.progress.step == 1
    assert "step 1: no probe: probe: only 2 of 5 prompts" in caplog.text
    assert "probe/seconds" not in run.writer.metrics[1]


def test_prompts_without_traces_have_rollouts_alone(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        config = make_config(tmp_path, probe=CFG)
        run = make_run(
            [fake.url], config, prompts=Prompts(traces=[1]), policy=FakePolicy(), refitter=Refits(fakes=[fake])
        )
        probe(run.prober, 0)
    scores = load(tmp_path / "probe" / "step_000000.npz")
    assert (scores.teacher_N >= 0).sum() == 1
    assert set(scores.log_ratio_N) == {"old"}, "the policy keeps no reference"


def test_it_is_made_at_the_steps_of_the_config_with_the_weights_of_that_step(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = run_of(tmp_path, fake, objective=ObjectiveConfig(alpha="auto"), batching={"updates_per_batch": 3})
        run.servers.refit(0)
        for _ in range(3):
            train_step(run.progress, run.collector, run.updater, run.evaluator, run.prober, run.recorder)
    assert sorted(path.name for path in (tmp_path / "probe").glob("*.npz")) == ["step_000002.npz"]
    assert 2 in run.servers.refitter.refitted, "the batch has a third update, but the probe needs the weights of now"
    records = run.writer.metrics
    assert "probe/seconds" in records[2]
    assert "probe/seconds" not in records[1]
    for name in records[2]:
        lookup(name, run.objective.metrics)
