"""``megatron-dypo route``: the real router, in front of stand-ins for servers."""

from __future__ import annotations

import itertools
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dypo.config.rollout import RolloutConfig, ServersConfig
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.sampling import request_body
from megatron_dypo.rollout.server.probe import http_status
from megatron_dypo.rollout.server.run_router import address_of, router_options, run_router
from tests.support.fake_sglang import FakeSGLang
from tests.support.rollout.clients import closed_url, make_client, make_prompts
from tests.support.routers import running_router

KEY = "0123456789abcdef"


@pytest.fixture
def router_process(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    with running_router(tmp_path, ["http://127.0.0.1:9"], KEY) as started:
        yield started


def test_the_router_shares_requests_among_the_servers_that_it_is_told_and_hands_the_key_on(
    router_process: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    url, process = router_process
    arrived = itertools.count(1)

    def answer_together(index: int, body: dict[str, Any]) -> str:
        """Answer when 12 requests have arrived at the two servers, so that all are open at once."""
        if next(arrived) == 12:
            one.release()
            other.release()
        return "hang"

    with FakeSGLang(answer_together, version="4") as one, FakeSGLang(answer_together, version="4") as other:
        client = make_client([one.url, other.url], router=url, api_key=KEY)
        assert len(collect(make_prompts(2), client, group_size=2, progress=False)[1].unserved) == 2

        Router(url, KEY).use_servers([one.url, other.url])
        client.use_servers([one.url, other.url], range(4, 5))
        groups, stats = collect(make_prompts(12), client, group_size=3, progress=False)
        assert (len(groups), stats.retries) == (12, 0)
        assert min(len(one.requests), len(other.requests)) >= 4
        assert set(one.authorization + other.authorization) == {f"Bearer {KEY}"}

        before = len(one.requests)
        Router(url, KEY).use_servers([other.url])
        assert len(collect(make_prompts(3), client, group_size=3, progress=False)[0]) == 3
        assert (len(one.requests), len(other.requests)) == (before, 15 - before)
    assert KEY not in " ".join(psutil.Process(process.pid).cmdline())
    assert KEY not in (tmp_path / "router.log").read_text()


def test_a_request_arrives_with_all_that_it_asks_for(router_process: tuple[str, subprocess.Popen]) -> None:
    """The router reads a request into its own type, and would drop a field that the type lacks."""
    url, _ = router_process
    (prompt,) = make_prompts(1)
    with FakeSGLang() as server:
        Router(url, KEY).use_servers([server.url])
        client = make_client([server.url], router=url, api_key=KEY, temperature=0.7, top_p=0.9, top_k=50)
        assert len(collect([prompt], client, group_size=3, progress=False)[0]) == 1
        (arrived,) = server.requests
    assert request_body(prompt.tokens, client.sampling(3)).items() <= arrived.items()


def test_the_router_refuses_who_does_not_know_the_key(router_process: tuple[str, subprocess.Popen]) -> None:
    url, _ = router_process
    assert http_status(f"{url}/workers", KEY) == 200
    for key in (None, "wrong"):
        assert http_status(f"{url}/workers", key) == 401
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = json.dumps({"input_ids": [1]}).encode()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{url}/generate", data=body, headers=headers), timeout=10)


def test_a_dead_server_behind_the_router_costs_no_group(router_process: tuple[str, subprocess.Popen]) -> None:
    url, _ = router_process
    with FakeSGLang(lambda index, body: "die" if index == 1 else "ok") as mortal, FakeSGLang() as other:
        Router(url, KEY).use_servers([mortal.url, other.url])
        client = make_client([mortal.url, other.url], router=url, api_key=KEY)
        assert len(collect(make_prompts(12), client, group_size=2, progress=False)[0]) == 12


def test_the_router_reaches_its_servers_through_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, closed_url())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FakeSGLang() as server, running_router(tmp_path, [server.url], KEY) as (url, _):
        Router(url, KEY).use_servers([server.url])
        client = make_client([server.url], router=url, api_key=KEY, retries=0)
        assert len(collect(make_prompts(1), client, group_size=2, progress=False)[0]) == 1


def test_requests_to_a_router_have_the_deadline_of_a_group() -> None:
    options = router_options(RolloutConfig(request_deadline_s=12.5), 9500, KEY)
    assert (options["host"], options["port"], options["request_timeout_secs"]) == ("127.0.0.1", 9500, 13)


def test_the_name_of_a_routers_host_is_looked_up() -> None:
    assert address_of("http://localhost:31811") == ("127.0.0.1", 31811)


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "https://127.0.0.1:1", "http://127.0.0.1", "http://:1", "http://127.0.0.1:1/a"]
)
def test_a_router_that_is_no_address_is_named_with_the_rule(url: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.servers\.router='{url}': must be http://HOST:PORT"):
        address_of(url)


def test_a_router_at_a_host_that_does_not_resolve_is_named() -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers\.router='http://absent\.invalid:1': (?!must be)\w"):
        address_of("http://absent.invalid:1")


def test_a_router_at_an_address_of_another_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", KEY)
    servers = ServersConfig(urls=("http://a:1",), router="http://192.0.2.1:31812")
    with pytest.raises(ValueError, match=r"rollout\.servers\.router='http://192\.0\.2\.1:31812': .*assign"):
        run_router(RolloutConfig(servers=servers))


def test_a_router_needs_the_key_of_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYPO_SGLANG_API_KEY", raising=False)
    servers = ServersConfig(urls=("http://a:1",), router="http://127.0.0.1:31812")
    with pytest.raises(ValueError, match="DYPO_SGLANG_API_KEY is not set"):
        run_router(RolloutConfig(servers=servers))


def test_a_config_without_a_router_starts_none() -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers\.router is not set"):
        run_router(RolloutConfig())
