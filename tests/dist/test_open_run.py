"""Runs that :func:`megatron_dypo.loop.setup.build.open_run` builds: with servers of its own, and without servers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.e2e.parity_task import write_task
from tests.support.fake_sglang import FakeSGLang

PROGRAM = Path(__file__).parents[1] / "support" / "fake_server_program.py"
ROUTER = "http://127.0.0.1:9"


def rank_open(path: str) -> dict[str, Any]:
    """Open and close the run of a config; return what it held in between."""
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.loop.books.recorder import NoWriter
    from megatron_dypo.loop.replica import Leader
    from megatron_dypo.loop.requests import LeaderRequests
    from megatron_dypo.loop.servers import Servers
    from megatron_dypo.loop.setup.build import open_run
    from megatron_dypo.rollout.router import Router
    from megatron_dypo.rollout.server.probe import http_status

    with open_run(load_config(path)) as run:
        assert isinstance(run.replica, Leader)
        servers = run.servers if isinstance(run.servers, Servers) else None
        urls = servers.refitter.serving if servers else ()
        router = servers.router if servers else None
        found = {
            "urls": urls,
            "health": [http_status(f"{url}/health", None) for url in urls],
            "asks": servers is not None and isinstance(servers.requests, LeaderRequests),
            "prompts": run.replica.num_prompts,
            "held out": {name: len(run.replica.held_out_items(name)) for name in run.replica.held_out},
            "router": (router.url, router.api_key) if isinstance(router, Router) else None,
            "reference": run.policy.keeps_reference,
            "writes": not isinstance(run.writer, NoWriter),
        }
    return found | {"health after": [http_status(f"{url}/health", None) for url in urls]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open_run")


def test_a_run_with_servers_starts_them_once_and_every_leader_can_ask_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "mine")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"\n')
    python.chmod(0o755)
    config = write_task(
        folder,
        eval={"sets": {"held_out": {"path": str(folder / "held_out.jsonl")}}},
        rollout={"servers": {"python": str(python), "per_node": 2, "port": 32600}},
    )
    first, second = run_ranks(2, rank_open, str(config))
    assert len(set(first["urls"])) == 2
    assert second["urls"] == first["urls"]
    assert first["health"] == second["health"] == [200, 200]
    assert first["health after"] == [None, None], "servers stop with the run that started them"
    for found in (first, second):
        assert found["asks"]
        assert (found["prompts"], found["held out"]) == (48, {"held_out": 8}), "each replica evaluates its part"
        assert found["reference"]
        assert found["router"] is None
    assert [found["writes"] for found in (first, second)] == [True, False]


def test_a_run_reaches_given_servers_and_their_router_with_the_key_of_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "mine")
    with FakeSGLang() as fake:
        servers = {"urls": [fake.url], "router": ROUTER}
        (found,) = run_ranks(1, rank_open, str(write_task(folder, rollout={"servers": servers})))
    assert found["urls"] == (fake.url,)
    assert found["router"] == (ROUTER, "mine")
    assert found["asks"]
    assert found["health after"] == [200], "nobody stops a server that the run did not start"


def test_a_run_that_asks_no_server_starts_none_and_needs_no_verifier(folder: Path) -> None:
    (found,) = run_ranks(1, rank_open, str(write_task(folder, objective={"name": "sft"})))
    assert found["urls"] == ()
    assert not found["asks"]
    assert not found["reference"]
    assert (found["prompts"], found["held out"]) == (48, {})
