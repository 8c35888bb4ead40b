"""A teacher in the loop: waiting rollouts have its log-probs, or their prompts are dropped and counted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.replica import Follower
from megatron_dypo.loop.resume import load_groups, save_checkpoint
from megatron_dypo.loop.setup.foundation import Foundation
from megatron_dypo.loop.setup.open_leader import OpenedLeader
from megatron_dypo.loop.setup.open_teacher import open_teacher
from megatron_dypo.loop.teacher import NoTeacher, Teacher, require_logprob_sources
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.rollout.teacher.client import TeacherClient
from megatron_dypo.types import DropReason
from tests.support.fake_sglang import FakeSGLang, Reply
from tests.support.fake_teacher import Codes, answer, logp_of
from tests.support.loop_cases import OneRank, Prompts, collect_groups, make_config, make_run, make_step, wrong
from tests.support.present import present


def run_with_teacher(server: FakeSGLang, teacher: FakeSGLang, run_dir: Path, **sections: Any) -> Any:
    """Return a run whose policy, writer and prompts are the fakes of ``loop_cases``."""
    cfg = TeacherServersConfig(urls=(teacher.url,), retries=0, request_deadline_s=20.0)
    sections = {"objective": ObjectiveConfig(name="opd"), **sections}
    run = make_run([server.url], make_config(run_dir, teacher_servers=cfg, **sections))
    client = TeacherClient(cfg, None, vocab_size=128, backoff_s=0.01)
    run.teacher = Teacher(client=client, reads=run.objective.reads_teacher, show_progress=False)
    return run


def refuses(*rows: int) -> Any:
    """Return the plan of a teacher that refuses the rollouts of these rows' prompts."""

    def plan(_: int, body: dict[str, Any]) -> Reply:
        return "400" if body["input_ids"][1] - 100 in rows else answer(body)

    return plan


STREAMED = {"rollout": {"oversample": 1.5}}


@pytest.mark.parametrize("sections", [{}, STREAMED], ids=["rounds", "stream"])
def test_every_rollout_of_an_update_has_the_teachers_log_probs(tmp_path: Path, sections: dict[str, Any]) -> None:
    with FakeSGLang() as server, FakeSGLang(refuses()) as teacher:
        run = run_with_teacher(server, teacher, tmp_path, **sections)
        make_step(run)
        run.servers.stream.stop()
    (update,) = run.policy.updates
    assert update
    for sample in update:
        response = sample.tokens[sample.num_prompt_tokens :]
        assert np.array_equal(sample.teacher_logp, np.array([logp_of(t) for t in response], np.float32))
        advantage = sample.weights["advantage"]
        assert np.ptp(advantage + (sample.old_logp - sample.teacher_logp)) < 1e-6
    assert "timing_s/teacher_log_prob" in run.writer.metrics[1]
    gaps = np.concatenate([sample.old_logp - sample.teacher_logp for sample in update])
    assert run.writer.metrics[1]["train/opd_reverse_kl"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert run.writer.metrics[1]["rollout/groups_without_teacher_logp"] == 0


def test_a_prompt_without_the_teachers_log_probs_is_dropped_counted_and_replaced(tmp_path: Path) -> None:
    with FakeSGLang() as server, FakeSGLang(refuses(1, 2)) as teacher:
        run = run_with_teacher(server, teacher, tmp_path)
        make_step(run)
    (update,) = run.policy.updates
    assert sorted({sample.order for sample in update}) == [0, 3, 4, 5]
    assert run.replica.books.ledger.dropped[DropReason.NO_TEACHER_LOGP] == 2
    assert run.writer.metrics[1]["rollout/groups_without_teacher_logp"] == 2
    balance = run.accounts.balance(run.progress.batch)
    assert balance.difference == 0


def test_a_teacher_that_gives_nothing_ends_the_run_after_a_round(tmp_path: Path) -> None:
    with FakeSGLang() as server, FakeSGLang(lambda *_: "500") as teacher:
        run = run_with_teacher(server, teacher, tmp_path)
        with pytest.raises(RunEnded, match=r"no rollout of 4 groups.*HTTP 500") as caught:
            make_step(run)
    assert caught.value.cause is Cause.SERVERS_GONE


def test_a_checkpoint_keeps_the_teachers_log_probs_and_what_lacks_them_is_asked_for(tmp_path: Path) -> None:
    with FakeSGLang() as server, FakeSGLang(refuses()) as teacher:
        run = run_with_teacher(server, teacher, tmp_path)
        collect_groups(run)
        save_checkpoint(run.checkpointer, run.progress)
        stored = load_groups(run.policy.saved[0]["leader_states"])
        waiting = run.replica.queues.groups()
        assert [len(group) for group in stored] == [len(group) for group in waiting]
        for group, kept in zip(stored, waiting, strict=True):
            for sample, own in zip(group, kept, strict=True):
                assert np.array_equal(present(sample.teacher_logp), present(own.teacher_logp))
        asked = len(teacher.requests)
        stored[0][0].teacher_logp = None
        run.replica.queues.replace(stored)
        make_step(run)
    assert len(teacher.requests) == asked + 1


def test_dypo_asks_for_hard_prompts_without_a_trace_alone(tmp_path: Path) -> None:
    objective = ObjectiveConfig(name="dypo", hard_without_trace="opd")
    with FakeSGLang() as server, FakeSGLang(refuses()) as teacher:
        cfg = TeacherServersConfig(urls=(teacher.url,))
        config = make_config(tmp_path, teacher_servers=cfg, objective=objective)
        run = make_run([server.url], config, judge=wrong, prompts=Prompts(traces=[0, 2]))
        client = TeacherClient(cfg, None, vocab_size=128)
        run.teacher = Teacher(client=client, reads=run.objective.reads_teacher, show_progress=False)
        make_step(run)
    assert {body["input_ids"][1] - 100 for body in teacher.requests} == {1, 3}


def test_an_objective_that_reads_a_teacher_needs_its_servers(tmp_path: Path) -> None:
    several: tuple[dict[str, Any], ...] = ({"name": "opd"}, {"name": "dypo", "hard_without_trace": "opd"})
    for options in several:
        config = make_config(tmp_path, objective=ObjectiveConfig(**options))
        with pytest.raises(ValueError, match=r"teacher_servers.urls=\(\).*objective.name"):
            require_logprob_sources(config, build_objective(config.objective))
    require_logprob_sources(make_config(tmp_path), build_objective(ObjectiveConfig()))


def opened(config: Config, tokenizer: Codes | None, is_leader: bool = True) -> Teacher | NoTeacher:
    base = Foundation(
        config=config,
        ranks=cast(Any, OneRank()),
        objective=build_objective(config.objective),
        policy=cast(Any, None),
        progress=Progress(),
        restored=None,
        with_servers=True,
        timings=Timings(),
        tally=Tally(),
        stack=contextlib.ExitStack(),
    )
    leader = OpenedLeader(leader=cast(Any, None), tokenizer=cast(Any, tokenizer), verifier=cast(Any, None))
    return open_teacher(base, leader if is_leader else Follower())


def test_a_leader_reaches_the_right_teacher_with_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYPO_TEACHER_API_KEY", "sesame")
    with FakeSGLang(lambda _, body: answer(body)) as teacher:
        cfg = TeacherServersConfig(urls=(teacher.url,))
        config = make_config(tmp_path, teacher_servers=cfg, objective=ObjectiveConfig(name="opd"))
        assert isinstance(opened(config, Codes()), Teacher)
        assert set(teacher.authorization) == {"Bearer sesame"}
        with pytest.raises(ValueError, match=r"teacher_servers\.urls=.*must have the policy's tokenizer"):
            opened(config, Codes(97))
        asked = len(teacher.requests)
        assert isinstance(opened(config, Codes(97), is_leader=False), NoTeacher)
        assert isinstance(opened(make_config(tmp_path, teacher_servers=cfg), Codes(97)), NoTeacher)
        assert len(teacher.requests) == asked
