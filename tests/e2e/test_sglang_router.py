"""Rollouts from two real SGLang servers through the real router."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.server_flags import ROUTES_FLAG
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.server.probe import request_json
from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.hf_models import make_hf_model
from tests.support.rollout.clients import make_prompts
from tests.support.routers import running_router


@pytest.fixture(scope="module")
def pool(sglang_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> ServerPool:
    model = make_hf_model("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")
    return sglang_servers(model, per_node=2, extra_args=(ROUTES_FLAG,))


@pytest.fixture(scope="module")
def router(pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    assert pool.api_key is not None
    with running_router(tmp_path_factory.mktemp("router"), pool.urls, pool.api_key) as (url, _):
        yield Router(url, pool.api_key)


def make_client(pool: ServerPool, router: Router | None, **fields: Any) -> SGLangClient:
    cfg = RolloutConfig(**{"max_new_tokens": 12, "request_deadline_s": 120.0, **fields})
    url = router.url if router else None
    return SGLangClient(
        pool.urls, pool.api_key, cfg=cfg, decode=str, stop_token_ids=(2,), check=pool.check, router=url, backoff_s=0.1
    )


def test_the_router_drops_the_request_for_experts_so_that_a_run_refuses_it(pool: ServerPool, router: Router) -> None:
    """Once a router passes it on, ``Config`` needs no rule on ``objective.replay`` and ``rollout.servers.router``."""
    router.use_servers(pool.urls)
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}, "return_routed_experts": True}
    metas = []
    for url in (pool.urls[0], router.url):
        status, answer = request_json("POST", f"{url}/generate", pool.api_key, body, timeout_s=60.0)
        assert status == 200
        metas.append(answer["meta_info"])
    assert ["routed_experts" in meta for meta in metas] == [True, False]


def post(pool: ServerPool, url: str, path: str, body: Any = None) -> int:
    headers = {"Authorization": f"Bearer {pool.api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data=json.dumps(body or {}).encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_groups_through_the_router_are_those_of_the_servers(pool: ServerPool, router: Router) -> None:
    router.use_servers(pool.urls)
    direct, routed = (
        collect(make_prompts(6), make_client(pool, way), group_size=1, temperature=0.0, progress=False)
        for way in (None, router)
    )
    assert routed[1].retries == 0
    for (expected,), (found,) in ((a.rollouts, b.rollouts) for a, b in zip(direct[0], routed[0], strict=True)):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-4)
        assert (found.finish, found.version_spans) == (expected.finish, expected.version_spans)
    groups, _ = collect(make_prompts(4), make_client(pool, router), group_size=8, progress=False)
    # Two may be equal: of the 131 tokens that may come first, one ends a rollout.
    assert all(len({tuple(rollout.tokens) for rollout in group.rollouts}) >= 6 for group in groups)


def test_a_server_that_the_router_is_not_told_of_samples_nothing(pool: ServerPool, router: Router) -> None:
    fenced, good = pool.urls
    for url, version in ((fenced, "7"), (good, "8")):
        assert post(pool, url, "/update_weight_version", {"new_version": version}) == 200
    client = make_client(pool, router, retries=20)
    client.use_servers([good], range(8, 9))
    router.use_servers([good])
    groups, stats = collect(make_prompts(8), client, group_size=2, progress=False)
    assert (len(groups), stats.wrong_versions) == (8, 0)
    router.use_servers(pool.urls)
    groups, stats = collect(make_prompts(8), client, group_size=2, progress=False)
    assert len(groups) == 8
    assert stats.wrong_versions > 0
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {8}


def test_a_group_that_is_cancelled_at_the_router_stops_at_the_server(pool: ServerPool, router: Router) -> None:
    """The server cannot flush its cache while requests run."""
    server = pool.urls[0]

    async def is_busy() -> bool:
        return await asyncio.to_thread(post, pool, server, "/flush_cache") != 200

    async def cancel_midway() -> None:
        async with make_client(pool, router) as client:
            sampling = client.sampling(64, max_new_tokens=490)
            task = asyncio.ensure_future(client.generate(make_prompts(1)[0].tokens, sampling))
            while not await is_busy():
                assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            deadline = time.monotonic() + 30
            while await is_busy():
                assert time.monotonic() < deadline

    router.use_servers([server])
    asyncio.run(cancel_midway())


def test_a_server_that_is_killed_behind_the_router_costs_no_group(pool: ServerPool, router: Router) -> None:
    router.use_servers(pool.urls)
    port = pool.urls[0].rpartition(":")[2]
    (server, *_) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if port in (process.info["cmdline"] or []) and Path(process.info["cmdline"][1]).name == "sglang_cpu.py"
    ]
    server.kill()
    groups, _ = collect(make_prompts(12), make_client(pool, router), group_size=4, progress=False)
    assert len(groups) == 12
