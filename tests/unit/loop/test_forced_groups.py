"""Rollouts that continue the beginning of a trace, in the loop: sampling, verdicts, log-probs, training, checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.batching.wire import dump_samples, load_samples
from megatron_dypo.config.objective import ObjectiveConfig, OldLogpConfig
from megatron_dypo.loop.requests import planner_of
from megatron_dypo.loop.teacher import require_logprob_sources
from megatron_dypo.loop.train import train_run
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.types import Prompt, Sample, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import ROUND, FakePolicy, Prompts, Records, Refits, collect_groups, make_config, make_run

PREFIX_RFT = ObjectiveConfig(name="prefix_rft", normalize_std=False, clip_low=None, clip_high=None)
TRAPO = ObjectiveConfig(name="trapo", normalize_std=False, clip_low=None, clip_high=None)

OPTIONS: dict[str, dict[str, Any]] = {"sft_then_rl": {"sft_steps": 1}}


class LongTraces(Prompts):
    """Prompts whose rows each have a trace of ten tokens; the last token ends the sequence."""

    def prompt(self, order: int) -> Prompt:
        plain = vars(super().prompt(order))
        return Prompt(**{**plain, "traces": {"teacher": np.array([*range(50, 59), 2], np.int32)}})


def judge(row: int, member: int) -> Verdict:
    """Judge: a response after a teacher's tokens (its row is negative) is right; so is the first of other requests."""
    is_right = row < 0 or member == 0
    return Verdict(is_correct=is_right, reward=float(is_right))


def config_with(tmp_path: Path, objective: ObjectiveConfig, k: int, **rollout: Any) -> Any:
    return make_config(
        tmp_path,
        steps=2,
        rollout={"group_size": k, **rollout},
        objective=objective,
        old_logp=OldLogpConfig(source="trainer"),
    )


def updates_of(tmp_path: Path, objective: ObjectiveConfig, k: int, **rollout: Any) -> tuple[list[list[Sample]], Any]:
    config = config_with(tmp_path, objective, k, **rollout)
    with FakeSGLang() as fake:
        refits = Refits(urls=[fake.url], fakes=[fake])
        run = make_run(
            [fake.url], config, judge=judge, refitter=refits, policy=FakePolicy(), prompts=LongTraces()
        )  # fmt: skip
        train_run(run)
        run.servers.stream.stop()
    assert isinstance(run.policy, FakePolicy)
    return run.policy.updates, run


def groups_of(update: list[Sample]) -> list[list[Sample]]:
    return [[s for s in update if s.order == order] for order in sorted({s.order for s in update})]


@pytest.mark.parametrize("rollout", [{}, {"oversample": 2.0}], ids=["rounds", "stream"])
def test_a_run_learns_from_one_rollout_of_each_group_behind_a_prefix(tmp_path: Path, rollout: dict[str, Any]) -> None:
    updates, run = updates_of(tmp_path, PREFIX_RFT, 4, **rollout)
    for update in updates:
        assert len(update) == 4 * ROUND
        for *own, behind in groups_of(update):
            # l = 0.95 in the first steps: 9 of 10 tokens.
            assert behind.num_forced_tokens == 9
            assert behind.tokens.tolist()[2:11] == list(range(50, 59))
            assert not any(sample.num_forced_tokens for sample in own)
            assert behind.old_logp is not None
            assert np.isfinite(behind.old_logp).all()
            assert behind.rollout_logp is not None
            assert np.isnan(behind.rollout_logp[:9]).all()
            assert own[0].old_entropy is None
            # The fake's entropies fall: int(9·0.8) = 7 of the prefix are left out, the last ones.
            assert behind.weights is not None
            advantage = np.array([1 - 1 / 3] * 2 + [0.0] * 7 + [1.0] * 3, np.float32)
            np.testing.assert_allclose(behind.weights["advantage"], advantage, rtol=1e-6)
    metrics = run.writer.metrics[2]
    assert isinstance(run.writer, Records)
    assert metrics["prefix_rft/forced_ratio"] == 0.25
    assert metrics["prefix_rft/forced_reward"] == 1.0
    assert metrics["prefix_rft/forced_share"] == pytest.approx(9 / 12)
    assert np.isfinite(metrics["train/train_rollout_logprob_abs_diff_max"])
    assert run.accounts.balance(run.progress.batch).difference == 0


@pytest.mark.parametrize("rollout", [{}, {"oversample": 2.0}], ids=["rounds", "stream"])
def test_micro_groups_follow_each_other_by_their_verdicts(tmp_path: Path, rollout: dict[str, Any]) -> None:
    updates, run = updates_of(tmp_path, TRAPO, 8, **rollout)
    for group in (group for update in updates for group in groups_of(update)):
        # 1 of 4 is right, then 3 of 6, then 4 of 7: below 0.5, 0.7 and 0.9.
        assert [sample.num_forced_tokens for sample in group] == [0, 0, 0, 0, 2, 2, 5, 10]
        assert [sample.reward for sample in group] == [1, 0, 0, 0, 1, 1, 1, 1]
        whole = group[-1]
        assert whole.tokens.tolist()[2:] == [*range(50, 59), 2]
        assert whole.weights is not None
        share = 1 / (ROUND * 8 * 10)
        np.testing.assert_allclose(whole.weights["nll_weight"], [share] * 10, rtol=1e-6)
        assert not np.any(whole.weights["pg_weight"])
    assert run.writer.metrics[2]["trapo/forced_ratio"] == 0.5


def test_forced_tokens_go_through_a_checkpoint(tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        run = make_run([fake.url], config_with(tmp_path, PREFIX_RFT, 4), judge=judge, prompts=LongTraces())
        collect_groups(run)
    run.replica.queues.replace(run.logprobs.complete(run.replica.queues.groups(), 0))
    samples = [sample for group in run.replica.queues.groups() for sample in group]
    for one, other in zip(samples, load_samples(dump_samples(samples)), strict=True):
        assert one.num_forced_tokens == other.num_forced_tokens
        for name in ("rollout_logp", "old_logp", "old_entropy"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_servers_log_probs_cannot_stand_for_those_of_forced_tokens(tmp_path: Path) -> None:
    config = make_config(tmp_path, objective=PREFIX_RFT)
    with pytest.raises(ValueError, match=r"old_logp\.source=server: must be trainer: objective\.name=prefix_rft"):
        require_logprob_sources(config, build_objective(config.objective))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_only_an_objective_with_plans_of_its_own_has_groups_sampled_in_parts(name: str) -> None:
    objective = build_objective(ObjectiveConfig(name=name, **OPTIONS.get(name, {})))
    planner = planner_of(objective, 8, step=lambda: 1, seed=1, judge=lambda group: ())
    assert (planner is not None) == (name in ("prefix_rft", "trapo"))
