"""Sampling goes on after servers are lost: one rank, fake servers, a refitter that names the next at each refit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_dypo.ending import RunEnded
from megatron_dypo.loop.books.step_metrics import rollout_metrics
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.requests import FollowerRequests, LeaderRequests
from megatron_dypo.loop.servers import NoRouter, NoServers, Servers
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import collect
from tests.support.fake_sglang import FakeSGLang
from tests.support.fake_sglang import sample as sample_response
from tests.support.loop_cases import NextServer, OneRank, make_config, make_run, requests_of
from tests.support.rollout.clients import closed_url, make_prompts

PAIRS = functools.partial(collect, group_size=2)


class Routes:
    """A router that records its calls."""

    def __init__(self) -> None:
        self.served: list[tuple[str, ...]] = []

    def use_servers(self, servers: Sequence[str]) -> None:
        self.served.append(tuple(servers))


@dataclass(frozen=True, kw_only=True)
class Accepting(FollowerRequests):
    """Requests that record the versions that they must accept."""

    accepted: list[list[int]] = field(default_factory=list)

    def accept(self, recent: range) -> None:
        self.accepted.append(list(recent))

    def use_servers(self, urls: Sequence[str], version: int, recent: range) -> None:
        self.accepted.append(list(recent))


def _refitted(servers: Servers | NoServers) -> list[int]:
    assert isinstance(servers, Servers)
    assert isinstance(servers.refitter, NextServer)
    return servers.refitter.refitted


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of the test's own, since a run writes its journal."""
    monkeypatch.chdir(tmp_path)


def of_urls(urls: Sequence[str], **rollout: Any) -> Servers:
    """Make the servers of one rank. At each refit the next of ``urls`` serves; before the first refit none does."""
    config = make_config("unused", rollout={"retries": 2, **rollout})
    servers = make_run([closed_url()], config, refitter=NextServer(urls)).servers
    assert isinstance(servers, Servers)
    servers.versions = (3,)
    return servers


def test_prompts_that_lost_their_servers_are_asked_again_after_a_refit() -> None:
    def dies_after(count: int) -> FakeSGLang:
        return FakeSGLang(lambda index, body: "ok" if index < count else "die", version="3")

    with dies_after(2) as one, dies_after(0) as two, dies_after(99) as three:
        servers = of_urls([one.url, two.url, three.url])
        servers.refit(3)
        groups = servers.sample(make_prompts(6), 3, "gen", PAIRS).groups
    assert [group.prompt.order for group in groups] == list(range(6))
    assert _refitted(servers) == [3, 3, 3]
    assert servers.tally["refit/fenced"] == 3
    assert servers.tally["dropped/incomplete"] == 0
    assert {"timing_s/gen", "timing_s/refit"} <= servers.timings.take().keys()


class NoServerLeft(NextServer):
    """A refitter that was asked to stop when no server was left."""

    def refit(self, version: int) -> RefitReport:
        report = super().refit(version)
        self.serving = ()
        return report


def test_after_a_refit_that_was_given_up_nobody_is_sent_anywhere() -> None:
    servers = of_urls([])
    router, requests = Routes(), Accepting()
    servers = replace(servers, refitter=NoServerLeft([closed_url()]), router=router, requests=requests)
    assert servers.refit(4)["refit/bytes"] == 64
    assert router.served == []
    assert requests.accepted == [[3, 4]], "before the refit"


def test_a_rank_that_cannot_reach_what_takes_refits_says_so_in_the_end() -> None:
    servers = of_urls([closed_url() for _ in range(9)])
    with pytest.raises(RunEnded, match="no SGLang server can be reached, though 2 refits in a row went well"):
        servers.sample(make_prompts(2), 3, "gen", PAIRS)
    assert len(_refitted(servers)) == 2


def test_requests_and_router_follow_each_refit() -> None:
    with FakeSGLang(version="3") as fake:
        servers = of_urls([fake.url])
        router = servers.router = Routes()
        metrics = servers.refit(3)
        assert len(servers.sample(make_prompts(1), 3, "gen", PAIRS).groups) == 1
    assert router.served == [(fake.url,)]
    assert metrics == {"refit/seconds": 1.0, "refit/pause_s": 0.5, "refit/bytes": 64.0}
    assert [servers.tally[f"refit/{name}"] for name in ("fenced", "rejoined", "retries")] == [1, 1, 2]


def test_a_run_without_servers_refits_nothing_and_does_not_ask() -> None:
    assert NoServers().refit(3) == {}
    NoServers().offload_servers()
    with pytest.raises(RuntimeError, match="step 4 asks for rollouts, and this run has no servers"):
        NoServers().sample([], 4, "gen", PAIRS)


def test_a_refit_takes_groups_of_its_version_and_of_the_one_before_and_of_none_between() -> None:
    requests = Accepting()
    servers = Servers(
        refitter=NextServer([closed_url() for _ in range(9)]),
        requests=requests,
        router=NoRouter(),
        ranks=OneRank(),
        tally=Tally(),
        timings=Timings(),
    )
    for version in (15, 18, 18, 18, 20):
        servers.refit(version)
    before, after = requests.accepted[::2], requests.accepted[1::2]
    assert before == after == [[15], [15, 18], [15, 18], [15, 18], [18, 20]]
    assert servers.versions == (18, 20)


def test_each_refit_counts_the_verifier_processes_that_were_replaced_since_the_last_one() -> None:
    totals: list[int] = []

    class Counting(Accepting):
        @property
        def num_replaced(self) -> int:
            return sum(totals)

    tally = Tally()
    servers = Servers(
        refitter=NextServer([closed_url() for _ in range(3)]),
        requests=Counting(),
        router=NoRouter(),
        ranks=OneRank(),
        tally=tally,
        timings=Timings(),
    )
    for version, more in enumerate((0, 3, 2)):
        totals.append(more)
        servers.refit(version)
        assert tally["verifiers_replaced"] == sum(totals)
    tally.add("asked")
    assert rollout_metrics(tally)["rollout/verifiers_replaced"] == 5


def test_a_refit_that_fails_is_not_remembered_as_one() -> None:
    servers = of_urls([])  # its refitter has no server left to name
    with pytest.raises(IndexError):
        servers.refit(4)
    assert servers.versions == (3,)


def test_a_long_answer_that_spans_refits_is_taken_after_a_rescue_refit_of_the_same_version() -> None:
    """One member ended before two refits, the other after them: the newest version is the server's."""
    ends = ("20", "23")

    def reply(body: dict[str, Any]) -> web.Response:
        return web.json_response([sample_response(body, i, weight_version=end) for i, end in enumerate(ends)])

    with FakeSGLang(lambda index, body: reply) as fake:
        servers = of_urls([fake.url] * 3)
        for version in (22, 23, 23):
            servers.refit(version)
        sampled = servers.sample(make_prompts(1), 23, "gen", PAIRS)
    assert [rollout.policy_version for rollout in sampled.groups[0].rollouts] == [20, 23]
    assert (servers.tally["wrong_versions"], servers.tally["dropped_tokens"]) == (0, 0)


def test_prompts_that_a_server_refuses_are_among_what_came_back() -> None:
    def refuse(body: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    with FakeSGLang(lambda index, body: refuse if body["input_ids"][-1] == 101 else "ok", version="3") as fake:
        servers = of_urls([fake.url])
        servers.refit(3)
        sampled = servers.sample(make_prompts(3), 3, "gen", PAIRS)
    assert [group.prompt.order for group in sampled.groups] == [0, 2]
    assert [dropped.prompt.order for dropped in sampled.dropped] == [1]


def test_refits_that_bring_a_group_each_are_never_too_many() -> None:
    def dies_after_one() -> FakeSGLang:
        return FakeSGLang(lambda index, body: "ok" if index < 1 else "die", version="3")

    with contextlib.ExitStack() as stack:
        dying = [stack.enter_context(dies_after_one()) for _ in range(5)]
        last = stack.enter_context(FakeSGLang(version="3"))
        servers = of_urls([fake.url for fake in (*dying, last)], max_in_flight=1)
        servers.refit(3)
        groups = servers.sample(make_prompts(7), 3, "gen", PAIRS).groups
    assert [group.prompt.order for group in groups] == list(range(7))
    assert _refitted(servers) == [3] * 6


def test_groups_come_in_the_order_of_their_draws_and_attempts_that_failed_are_counted() -> None:
    with FakeSGLang(lambda index, body: "500" if index == 0 else "ok", version="3") as fake:
        servers = of_urls([fake.url])
        servers.refit(3)
        groups = servers.sample(make_prompts(3)[::-1], 3, "gen", PAIRS).groups
    assert [group.prompt.order for group in groups] == [0, 1, 2]
    assert servers.tally["retries"] == 1


def test_a_follower_asks_nothing_and_joins_the_refits() -> None:
    run = make_run([closed_url()], make_config("unused"), ranks=Follows(), refitter=NextServer([closed_url()]))
    assert isinstance(run.servers, Servers)
    assert not isinstance(run.servers.requests, LeaderRequests)
    run.servers.refit(1)
    assert run.servers.sample([], 1, "gen", PAIRS).groups == []
    assert _refitted(run.servers) == [1]
    leads = make_run([closed_url()], make_config("unused"))
    assert isinstance(requests_of(leads), LeaderRequests)


@dataclass(frozen=True, kw_only=True)
class Follows(OneRank):
    """A rank that leads nothing."""

    is_leader: bool = False
