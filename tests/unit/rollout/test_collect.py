"""Collecting groups from servers that fail in every way."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

import megatron_dypo.rollout.collect as collect_module
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.metrics.progress import progress
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.types import DropReason, RolloutGroup, Tokens
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.support.rollout.clients import closed_url, make_client, make_prompts


def test_groups_come_in_the_order_of_prompts_whatever_the_order_of_answers() -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        if len(fake.requests) == 6:
            fake.release()
        return "hang" if body["input_ids"][-1] < 103 else "ok"

    with FakeSGLang(plan) as fake:
        groups, stats = collect(make_prompts(6), make_client([fake.url]), group_size=3, progress=False)
    assert [group.prompt.order for group in groups] == list(range(6))
    for i, group in enumerate(groups):
        assert [rollout.tokens.tolist() for rollout in group.rollouts] == [[100 + i, k, 2] for k in range(3)]
        assert group.rollouts[0].text == f"{100 + i} 0 2"
        np.testing.assert_array_equal(group.rollouts[0].logp, np.array([-1, -2, -3], dtype=np.float32))
    assert (stats.prompts, stats.rollouts, stats.tokens) == (6, 18, 54)
    assert (len(stats.dropped), stats.retries, stats.truncated) == (0, 0, 0)


def test_a_request_carries_tokens_sampling_and_key() -> None:
    with FakeSGLang() as fake:
        client = make_client([fake.url], temperature=0.7, top_p=0.9, top_k=40)
        collect(make_prompts(1), client, group_size=4, progress=False)
        collect(make_prompts(1), client, group_size=1, temperature=0.0, max_new_tokens=9, progress=False)
    training, evaluation = fake.requests
    assert training["input_ids"] == [7, 100]
    assert training["return_logprob"] is True
    expected = {"n": 4, "temperature": 0.7, "max_new_tokens": 16, "top_p": 0.9, "top_k": 40, "stop_token_ids": [2, 5]}
    assert training["sampling_params"] == expected
    assert evaluation["sampling_params"] == {**expected, "n": 1, "temperature": 0.0, "max_new_tokens": 9}
    assert fake.authorization == ["Bearer key"] * 2


@pytest.mark.parametrize("failure", ["500", "reset", "partial", "aborted"])
def test_a_failed_attempt_is_retried_and_the_group_is_whole(failure: str) -> None:
    with FakeSGLang(lambda index, body: failure if index < 2 else "ok") as fake:
        groups, stats = collect(make_prompts(1), make_client([fake.url]), group_size=4, progress=False)
    assert [len(group.rollouts) for group in groups] == [4]
    assert (stats.retries, len(stats.dropped)) == (2, 0)
    assert len(fake.requests) == 3


@pytest.mark.parametrize("failure", ["500", "reset", "partial", "aborted"])
def test_a_group_that_stays_incomplete_is_dropped_whole_and_counted(failure: str) -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        return failure if body["input_ids"][-1] == 101 else "ok"

    with FakeSGLang(plan) as fake:
        groups, stats = collect(make_prompts(3), make_client([fake.url], retries=2), group_size=4, progress=False)
    assert [group.prompt.order for group in groups] == [0, 2]
    assert all(len(group.rollouts) == 4 for group in groups)
    assert (stats.prompts, stats.rollouts, len(stats.dropped), stats.retries) == (3, 8, 1, 2)


def test_the_wait_before_a_retry_doubles() -> None:
    with FakeSGLang(lambda index, body: "500" if index < 4 else "ok") as fake:
        collect(make_prompts(1), make_client([fake.url], retries=4), group_size=2, progress=False)
    gaps = np.diff(fake.arrivals)
    assert (gaps >= 0.5 * 0.02 * 2.0 ** np.arange(4)).all()


def test_a_group_past_its_deadline_is_dropped_and_its_request_aborted() -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        return "hang" if body["input_ids"][-1] == 100 else "ok"

    with FakeSGLang(plan) as fake:
        client = make_client([fake.url], request_deadline_s=0.3)
        groups, stats = collect(make_prompts(2), client, group_size=2, progress=False)
        wait_until(lambda: fake.cancelled == 1, "the connection is closed")
    assert [group.prompt.order for group in groups] == [1]
    assert len(stats.dropped) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_dropped_at_once_and_alone(status: int) -> None:
    def refuse(body: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "the prompt is too long"}}, status=status)

    with FakeSGLang(lambda index, body: refuse if body["input_ids"][-1] == 101 else "ok") as fake:
        groups, stats = collect(make_prompts(3), make_client([fake.url]), group_size=2, progress=False)
    assert [group.prompt.order for group in groups] == [0, 2]
    assert (len(stats.dropped), stats.retries, len(fake.requests)) == (1, 0, 3)
    (dropped,) = stats.dropped
    assert dropped.reason is DropReason.REFUSED
    assert f"{fake.url}/generate: HTTP {status}: " in dropped.message
    assert "the prompt is too long" in dropped.message


def test_two_servers_share_the_load_evenly() -> None:
    def plan(index: int, body: dict[str, Any]) -> str:
        if len(one.requests) + len(two.requests) == 8:
            one.release()
            two.release()
        return "hang"

    with FakeSGLang(plan) as one, FakeSGLang(plan) as two:
        groups, _ = collect(make_prompts(8), make_client([one.url, two.url]), group_size=2, progress=False)
    assert len(groups) == 8
    assert (len(one.requests), len(two.requests)) == (4, 4)


def test_a_dead_server_does_not_swallow_the_requests_of_a_live_one() -> None:
    with FakeSGLang() as fake:
        client = make_client([closed_url(), fake.url], retries=1, max_in_flight=4)
        groups, stats = collect(make_prompts(40), client, group_size=2, progress=False)
    assert len(groups) == 40
    assert 1 <= stats.retries < 20


def test_without_a_server_the_prompts_are_handed_back() -> None:
    prompts = make_prompts(3)
    groups, stats = collect(prompts, make_client([closed_url()], retries=0), group_size=2, progress=False)
    assert groups == []
    assert stats.unserved == tuple(prompts)
    assert (stats.prompts, len(stats.dropped)) == (0, 0)


def test_when_the_last_server_dies_what_it_answered_is_kept() -> None:
    with FakeSGLang(lambda index, body: "ok" if index < 2 else "die") as fake:
        client = make_client([fake.url], max_in_flight=1)
        groups, stats = collect(make_prompts(4), client, group_size=2, progress=False)
    assert [group.prompt.order for group in groups] == [0, 1]
    assert [prompt.order for prompt in stats.unserved] == [2, 3]


def test_a_server_of_another_version_is_asked_no_more_and_what_it_gave_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeSGLang(version="3") as right, FakeSGLang(version="default") as restarted:
        client = make_client([right.url, restarted.url], max_in_flight=1)
        client.use_servers([right.url, restarted.url], range(3, 4))
        groups, stats = collect(make_prompts(6), client, group_size=4, progress=False)
    assert [group.prompt.order for group in groups] == list(range(6))
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {3}
    assert (len(restarted.requests), stats.wrong_versions) == (1, 4)
    assert f"dropped 4 rollouts of {restarted.url}: weights of version default; the last refit was of 3" in caplog.text


def test_a_server_serves_again_once_it_is_named_again() -> None:
    with FakeSGLang(version="4") as fake:
        client = make_client([fake.url])
        client.use_servers([fake.url], range(5, 6))
        assert len(collect(make_prompts(2), client, group_size=2, progress=False)[1].unserved) == 2
        client.use_servers([fake.url], range(4, 5))
        assert len(collect(make_prompts(2), client, group_size=2, progress=False)[0]) == 2


def test_requests_go_to_the_router_whatever_servers_are_named() -> None:
    with FakeSGLang(version="4") as router:
        client = make_client([closed_url()], router=router.url)
        client.use_servers([closed_url()], range(4, 5))
        assert len(collect(make_prompts(2), client, group_size=2, progress=False)[0]) == 2


def test_no_more_requests_are_open_than_allowed() -> None:
    with FakeSGLang(lambda index, body: "hang") as fake:
        client = make_client([fake.url], max_in_flight=4)
        worker = threading.Thread(
            target=collect, args=(make_prompts(12), client), kwargs={"group_size": 2, "progress": False}
        )
        worker.start()
        wait_until(lambda: fake.open == 4, "4 requests are open")
        fake.release()
        worker.join(10)
    assert len(fake.requests) == 12
    assert fake.max_open == 4


def test_a_server_that_dies_ends_the_collection_at_once_and_aborts_the_rest() -> None:
    def check() -> None:
        if fake.open == 3:
            raise ServerDiedError("SGLang server 0 (http://…) ended with status 137")

    with FakeSGLang(lambda index, body: "hang") as fake:
        client = make_client([fake.url], check, request_deadline_s=3600.0)  # so long that nobody can have waited for it
        with pytest.raises(ServerDiedError, match=r"server 0 .* status 137"):
            collect(make_prompts(3), client, group_size=2, progress=False)
        wait_until(lambda: fake.cancelled == 3, "all connections are closed")


def test_a_cancelled_group_closes_its_connection() -> None:
    async def cancel_midway(client: SGLangClient) -> None:
        async with client:
            task = asyncio.ensure_future(client.generate(make_prompts(1)[0].tokens, client.sampling(2)))
            await asyncio.to_thread(wait_until, lambda: fake.open == 1, "the request is open")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: fake.cancelled == 1, "its connection is closed")

    with FakeSGLang(lambda index, body: "hang") as fake:
        asyncio.run(cancel_midway(make_client([fake.url])))


def test_truncated_rollouts_are_marked_and_counted() -> None:
    with FakeSGLang(lambda index, body: "length") as fake:
        groups, stats = collect(make_prompts(2), make_client([fake.url]), group_size=3, progress=False)
    assert [rollout.finish for rollout in groups[0].rollouts] == ["length", "stop", "stop"]
    assert stats.truncated == 2


def test_no_prompts_no_requests() -> None:
    with FakeSGLang() as fake:
        groups, stats = collect([], make_client([fake.url]), group_size=3, progress=False)
    assert (groups, stats.prompts, fake.requests) == ([], 0, [])


def test_progress_counts_responses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "progress_bar", functools.partial(progress, every_s=0.0))
    with FakeSGLang() as fake:
        collect(make_prompts(2), make_client([fake.url]), group_size=3, desc="evaluation")
    assert "evaluation: 6/6 responses" in capsys.readouterr().err


def test_a_loss_that_is_seen_after_the_last_connection_was_refused_is_raised_all_the_same() -> None:
    """A server's connections end before its process does."""
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise ServerDiedError("SGLang server 0 (http://…) ended with status 137")

    with pytest.raises(ServerDiedError, match="status 137"):
        collect(make_prompts(3), make_client([closed_url()], check), group_size=2, progress=False)


def test_a_stop_request_ends_a_collection_and_keeps_its_open_groups() -> None:
    stop = StopFlag()

    def plan(index: int, body: dict[str, Any]) -> str:
        if len(fake.requests) == 4:
            stop.set()
        return "hang" if body["input_ids"][-1] != 101 else "ok"

    prompts = make_prompts(4)
    with FakeSGLang(plan) as fake:
        client = make_client([fake.url], max_in_flight=4)
        groups, stats = collect(prompts, client, group_size=2, progress=False, stop=stop)
        wait_until(lambda: fake.cancelled >= 3, "the open requests are aborted")
    done = {group.prompt.order for group in groups}
    assert done <= {1}
    assert [prompt.order for prompt in stats.unfinished] == [order for order in range(4) if order not in done]
    assert (stats.prompts, len(stats.dropped), stats.unserved) == (len(done), 0, ())


def test_after_a_stop_request_nothing_is_asked() -> None:
    stop = StopFlag()
    stop.set()
    with FakeSGLang(lambda index, body: "hang") as fake:
        groups, stats = collect(make_prompts(2), make_client([fake.url]), group_size=2, progress=False, stop=stop)
    assert (groups, [prompt.order for prompt in stats.unfinished]) == ([], [0, 1])


def test_a_check_that_takes_its_time_holds_up_no_answer() -> None:
    """A check may take long: it may restart a server or read its log."""
    answered = threading.Event()

    def check() -> None:
        assert answered.wait(10.0), "no answer came in while the check ran"

    def plan(index: int, body: dict[str, Any]) -> str:
        if index == 1:
            answered.set()
        return "ok"

    with FakeSGLang(plan) as fake:
        client = make_client([fake.url], check, max_in_flight=1)
        groups, _ = collect(make_prompts(2), client, group_size=2, progress=False)
    assert len(groups) == 2


def test_no_reader_sees_the_servers_of_one_refit_with_the_versions_of_another() -> None:
    client = make_client(["http://a:1"])
    over = threading.Event()

    def refit() -> None:
        for version in range(20_000):
            client.use_servers([f"http://{'ab'[version % 2]}:1"], (version,))
        over.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        client.use_servers(["http://a:1"], (0,))
        trainer = threading.Thread(target=refit)
        trainer.start()
        while not over.is_set():
            upstream = client.upstream
            with upstream.servers.server() as url:
                assert upstream.versions is not None
                assert url == f"http://{'ab'[upstream.versions[0] % 2]}:1"
        trainer.join()
    finally:
        sys.setswitchinterval(interval)


def test_new_versions_leave_the_servers_as_they_are() -> None:
    client = make_client(["http://a:1"])
    before = client.upstream
    client.accept((3, 4))
    assert client.upstream.servers is before.servers
    assert (before.versions, client.upstream.versions) == (None, (3, 4))


def test_a_bug_in_one_group_ends_the_collection_at_once() -> None:
    def decode(tokens: Tokens) -> str:
        raise KeyError("our own bug")

    def plan(index: int, body: dict[str, Any]) -> str:
        return "hang" if body["input_ids"][-1] == 100 else "ok"

    with FakeSGLang(plan) as fake:
        cfg = RolloutConfig(max_new_tokens=16, request_deadline_s=20.0)
        client = SGLangClient([fake.url], None, cfg=cfg, decode=decode, stop_token_ids=(2,))
        with pytest.raises(KeyError, match="our own bug"):
            collect(make_prompts(2), client, group_size=2, progress=False)


def test_a_request_is_five_calls_away_from_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are: generate, get an answer with retries, ask one server."""
    post, calls = aiohttp.ClientSession.post, []

    def noted(self: aiohttp.ClientSession, *args: Any, **options: Any) -> Any:
        ours = [frame.function for frame in inspect.stack()[1:] if "megatron_dypo/rollout" in frame.filename]
        calls.append(ours[: ours.index("collect") + 1])
        return post(self, *args, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "post", noted)
    with FakeSGLang() as fake:
        collect(make_prompts(1), make_client([fake.url]), group_size=2, progress=False)
    assert calls == [["ask", "exchange", "generate", "sample_group", "ask", "collect"]]


def test_whole_groups_are_noted_in_a_thread_one_at_a_time_and_an_error_there_ends_the_collection() -> None:
    noted: list[tuple[str, int]] = []

    def note(group: RolloutGroup) -> None:
        noted.append((threading.current_thread().name, group.prompt.order))
        if group.prompt.order == 70:
            raise OSError("the disk is full")

    with FakeSGLang() as fake:
        collect(make_prompts(70), make_client([fake.url]), group_size=2, progress=False, on_group=note)
        assert sorted(order for _, order in noted) == list(range(70))
        assert {name for name, _ in noted} == {"groups_0"}
        with pytest.raises(OSError, match="the disk is full"):
            collect(make_prompts(71), make_client([fake.url]), group_size=2, progress=False, on_group=note)
