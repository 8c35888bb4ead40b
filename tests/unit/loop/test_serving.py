"""Asking on after servers have gone: one rank, fake servers, and a bridge that names the next one at each push."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.ending import RunEnded
from megatron_dypo.loop.servers import push, sample
from megatron_dypo.loop.tally import Tally
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import collect
from tests.support.fake_sglang import FakeSGLang
from tests.support.fake_sglang import sample as sample_response
from tests.unit.rollout.test_collect import closed_url, make_prompts


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


class NextServer:
    """A bridge: after each push another server serves."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self.pushed = list(urls), list[int]()
        self.serving: tuple[str, ...] = (closed_url(),)

    def refit(self, version: int) -> RefitReport:
        self.pushed.append(version)
        self.serving = (self._urls.pop(0),)
        return RefitReport(
            version=version, seconds=1.0, pause_seconds=0.5, bytes=64, fenced=1, rejoined=1, retries=2
        )  # fmt: skip


class Routes:
    """A router that keeps what it is told."""

    def __init__(self) -> None:
        self.served: list[tuple[str, ...]] = []

    def serve(self, servers: Sequence[str]) -> None:
        self.served.append(tuple(servers))


class Accepting:
    """A stream that keeps which versions it is told to take."""

    def __init__(self) -> None:
        self.accepted: list[list[int]] = []

    def accept(self, versions: Sequence[int]) -> None:
        self.accepted.append(list(versions))

    def serve(self, urls: Sequence[str], versions: Sequence[int]) -> None:
        self.accept(versions)


def make_run(urls: Sequence[str], **options: Any) -> Any:
    cfg = RolloutConfig(max_new_tokens=16, request_deadline_s=20.0, **options)

    def client() -> SGLangClient:
        return SGLangClient([closed_url()], None, cfg=cfg, decode=str, stop_token_ids=(2,), backoff_s=0.02)

    return SimpleNamespace(
        step=3,
        served_version=3,
        pushed=(3,),
        bridge=NextServer(urls),
        router=Routes(),
        leader=SimpleNamespace(client=client(), background_client=client(), background=None, group=Alone()),
        layout=SimpleNamespace(is_global_leader=True, replica_group=Alone()),
        tally=Tally(),
        timings=Timings(),
    )


def test_prompts_that_lost_their_servers_are_asked_again_after_a_push() -> None:
    def dies_after(count: int) -> FakeSGLang:
        return FakeSGLang(lambda index, body: "ok" if index < count else "die", version="3")

    with dies_after(2) as one, dies_after(0) as two, dies_after(99) as three:
        run = make_run([one.url, two.url, three.url])
        push(run)
        groups = sample(run, make_prompts(6), "gen", group_size=2).groups
    assert [group.prompt.order for group in groups] == list(range(6))
    assert run.bridge.pushed == [3, 3, 3]
    assert run.tally["refit/fenced"] == 3
    assert run.tally["dropped/incomplete"] == 0
    assert {"timing_s/gen", "timing_s/refit"} <= run.timings.take().keys()


def test_a_rank_that_cannot_reach_what_takes_pushes_says_so_in_the_end() -> None:
    run = make_run([closed_url() for _ in range(9)])
    with pytest.raises(RunEnded, match="no SGLang server can be reached, though 2 pushes in a row went well"):
        sample(run, make_prompts(2), "gen", group_size=2)
    assert len(run.bridge.pushed) == 2


def test_requests_and_router_follow_each_push() -> None:
    with FakeSGLang(version="3") as fake:
        run = make_run([fake.url])
        metrics = push(run)
        assert len(sample(run, make_prompts(1), "gen", group_size=2).groups) == 1
        of_the_background = collect(make_prompts(1), run.leader.background_client, group_size=2, progress=False)
        assert len(of_the_background[0]) == 1
    assert run.router.served == [(fake.url,)]
    assert metrics == {"refit/seconds": 1.0, "refit/bytes": 64.0, "refit/pause_s": 0.5}
    assert (run.tally["refit/fenced"], run.tally["refit/rejoined"], run.tally["refit/retries"]) == (1, 1, 2)


def test_a_run_without_servers_pushes_nothing() -> None:
    assert push(SimpleNamespace(bridge=None)) == {}  # type: ignore[arg-type]


def test_a_push_takes_groups_of_its_version_and_of_the_one_before_and_of_none_between() -> None:
    run = make_run([closed_url() for _ in range(9)])
    run.pushed, run.leader.background = (), Accepting()
    for step in (15, 18, 18, 18, 20):
        run.step = step
        push(run)
    before, after = run.leader.background.accepted[::2], run.leader.background.accepted[1::2]
    assert before == after == [[15], [15, 18], [15, 18], [15, 18], [18, 20]]
    assert (run.pushed, run.served_version) == ((18, 20), 20)


def test_a_push_that_fails_is_not_remembered_as_one() -> None:
    run = make_run([])  # its bridge has no server left to name
    run.step = 4
    with pytest.raises(IndexError):
        push(run)
    assert (run.pushed, run.served_version) == ((3,), 3)


def test_a_long_answer_that_spans_pushes_is_taken_after_a_rescue_push_of_the_same_version() -> None:
    """One member ended before two pushes, the other after: the newest version is the server's."""
    ends = ("20", "23")

    def reply(body: dict[str, Any]) -> web.Response:
        return web.json_response([sample_response(body, i, weight_version=end) for i, end in enumerate(ends)])

    with FakeSGLang(lambda index, body: reply) as fake:
        run = make_run([fake.url] * 3)
        for step in (22, 23, 23):
            run.step = step
            push(run)
        client = run.leader.client
        groups, stats = collect(make_prompts(1), client, group_size=2, progress=False)
    assert [rollout.policy_version for rollout in groups[0].rollouts] == [20, 23]
    assert (stats.wrong_versions, stats.unserved, client.dropped_tokens) == (0, (), 0)


def test_prompts_that_a_server_refuses_are_among_what_came_back() -> None:
    def refuse(body: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    with FakeSGLang(lambda index, body: refuse if body["input_ids"][-1] == 101 else "ok", version="3") as fake:
        run = make_run([fake.url])
        push(run)
        sampled = sample(run, make_prompts(3), "gen", group_size=2)
    assert [group.prompt.order for group in sampled.groups] == [0, 2]
    assert [dropped.prompt.order for dropped in sampled.dropped] == [1]


def test_pushes_that_bring_a_group_each_are_never_too_many() -> None:
    def dies_after_one() -> FakeSGLang:
        return FakeSGLang(lambda index, body: "ok" if index < 1 else "die", version="3")

    with contextlib.ExitStack() as stack:
        dying = [stack.enter_context(dies_after_one()) for _ in range(5)]
        last = stack.enter_context(FakeSGLang(version="3"))
        run = make_run([fake.url for fake in (*dying, last)], max_in_flight=1)
        push(run)
        groups = sample(run, make_prompts(7), "gen", group_size=2).groups
    assert [group.prompt.order for group in groups] == list(range(7))
    assert run.bridge.pushed == [3] * 6


def test_groups_come_in_the_order_of_their_draws_and_attempts_that_failed_are_counted() -> None:
    with FakeSGLang(lambda index, body: "500" if index == 0 else "ok", version="3") as fake:
        run = make_run([fake.url])
        push(run)
        groups = sample(run, make_prompts(3)[::-1], "gen", group_size=2).groups
    assert [group.prompt.order for group in groups] == [0, 1, 2]
    assert run.tally["retries"] == 1
