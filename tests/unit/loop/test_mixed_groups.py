"""Groups of rollouts with a teacher's trace in the loop: sampling, verdicts, queues, training, and accounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.loop.train import train_run
from megatron_dypo.types import DropReason, SampleKind, Treatment, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import (
    PROMPTS,
    ROUND,
    FakePolicy,
    Prompts,
    Records,
    Refits,
    collect_groups,
    make_config,
    make_run,
)

LUFFY = ObjectiveConfig(name="luffy", normalize_std=False, clip_low=None, clip_high=None)


def judge(row: int, member: int) -> Verdict:
    """Judge: a trace (its row is negative) is right and gets 0.75; of the rollouts the first is right."""
    is_trace = row < 0
    return Verdict(is_correct=is_trace or member == 0, reward=0.75 if is_trace else float(member == 0))


def test_a_group_has_its_rollouts_and_the_judged_trace_and_is_one_draw(tmp_path: Path) -> None:
    config = make_config(tmp_path, rollout={"group_size": 4}, objective=LUFFY)
    with FakeSGLang() as fake:
        run = make_run([fake.url], config, judge=judge, prompts=Prompts(traces=range(1, PROMPTS)))
        collect_groups(run)
    waiting = run.replica.queues.waiting
    assert [len(waiting[t]) for t in (Treatment.MIX, Treatment.REINFORCE, Treatment.DISTILL)] == [ROUND - 1, 1, 0]
    for group in waiting[Treatment.MIX]:
        assert [sample.kind for sample in group] == [*[SampleKind.ROLLOUT] * 3, SampleKind.TRACE]
        assert [sample.member for sample in group] == [0, 1, 2, 3]
        assert [sample.reward for sample in group] == [1.0, 0.0, 0.0, 0.75]
        assert len({(sample.order, sample.policy_version) for sample in group}) == 1
        assert group[-1].rollout_logp is None
    (alone,) = waiting[Treatment.REINFORCE]
    assert [sample.kind for sample in alone] == [SampleKind.ROLLOUT] * 3
    assert run.accounts.balance(run.progress.batch).difference == 0
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert {row["treatment"]: row["teacher"] for row in rows} == {"mix": "teacher", "reinforce": None}


@pytest.mark.parametrize("rollout", [{}, {"oversample": 2.0}], ids=["rounds", "stream"])
def test_a_run_trains_on_both_with_the_traces_advantage_over_all_members(
    tmp_path: Path, rollout: dict[str, Any]
) -> None:
    config = make_config(tmp_path, steps=2, rollout={"group_size": 4, **rollout}, objective=LUFFY)
    with FakeSGLang() as fake:
        refits = Refits(urls=[fake.url], fakes=[fake])
        run = make_run([fake.url], config, judge=judge, refitter=refits, policy=FakePolicy())
        train_run(run)
        run.servers.stream.stop()
    assert isinstance(run.policy, FakePolicy)
    for samples in run.policy.updates:
        assert len(samples) == 4 * ROUND
        for sample in samples:
            assert sample.weights is not None
            advantage = sample.reward - 1.75 / 4
            if sample.kind is SampleKind.TRACE:
                share = advantage / (ROUND * 4 * sample.num_response_tokens)
                assert sample.weights["nll_weight"] == pytest.approx(share)
                assert sample.old_logp is None
            else:
                assert sample.weights["advantage"] == pytest.approx(advantage)
    assert isinstance(run.writer, Records)
    metrics = run.writer.metrics[2]
    assert metrics["ledger/trained_mix"] == 2 * ROUND
    assert metrics["luffy/trace_advantage"] == pytest.approx(0.75 - 1.75 / 4)
    assert metrics["luffy/trace_reward"] == 0.75
    assert metrics["gate/offline_share_prompts"] == 1.0
    assert metrics["gate/offline_share_sequences"] == 0.25
    # A trace counts in the step that drew it: a stream may draw the second step's groups in the first.
    assert run.writer.metrics[1]["teacher/teacher/share"] == 1.0


def test_a_group_whose_trace_has_no_verdict_is_dropped_and_says_why(tmp_path: Path) -> None:
    def silent_on_traces(row: int, member: int) -> Verdict:
        verdict = judge(row, member)
        return Verdict(is_correct=False, reward=0.0, error="KeyError: 'x'") if row < 0 else verdict

    config = make_config(tmp_path, rollout={"group_size": 4}, batching={"max_collect_rounds": 1}, objective=LUFFY)
    with FakeSGLang() as fake:
        run = make_run([fake.url], config, judge=silent_on_traces, prompts=Prompts(traces=range(2)))
        collect_groups(run)
    assert run.replica.books.ledger.dropped[DropReason.NO_VERDICT] == 2
    assert [len(queue) for queue in run.replica.queues.waiting.values()] == [0, ROUND - 2, 0]


def test_without_a_wish_for_verdicts_of_traces_the_verifier_gets_none(tmp_path: Path) -> None:
    judged = list[int]()

    def note(row: int, member: int) -> Verdict:
        judged.append(row)
        return judge(row, member)

    config = make_config(tmp_path, rollout={"group_size": 3}, objective=ObjectiveConfig(name="chord"))
    with FakeSGLang() as fake:
        run = make_run([fake.url], config, judge=note)
        collect_groups(run)
    assert len(judged) == 3 * ROUND
    assert all(row >= 0 for row in judged)
    assert len(run.replica.queues.waiting[Treatment.MIX]) == ROUND
