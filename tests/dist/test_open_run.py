"""A run as :func:`megatron_dypo.run.open_run` builds it: with servers that it starts, and without any."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.dist.spawn import run_ranks
from tests.e2e.parity_task import write_task
from tests.unit.rollout.fake_sglang import FakeSGLang

PROGRAM = Path(__file__).parents[1] / "unit" / "rollout" / "fake_server_program.py"
ROUTER = "http://127.0.0.1:9"


def rank_open(path: str) -> dict[str, Any]:
    """Open and close the run of a config; what it held in between."""
    from megatron_dypo.config.load import load_config
    from megatron_dypo.rollout.probe import http_status
    from megatron_dypo.run import open_run

    with open_run(load_config(path)) as run:
        leader = run.leader
        assert leader is not None
        urls = run.bridge.serving if run.bridge else ()
        found = {
            "urls": urls,
            "health": [http_status(f"{url}/health", None) for url in urls],
            "clients": [client is not None for client in (leader.client, leader.background_client)],
            "verifier": leader.verifier is not None,
            "prompts": len(leader.stream),
            "held out": {name: len(stream) for name, stream in leader.held_out.items()},
            "router": None if run.router is None else (run.router.url, run.router.api_key),
            "reference": run.reference is not None,
            "writes": run.writer is not None,
            "background": leader.background,
        }
    return found | {"health after": [http_status(f"{url}/health", None) for url in urls]}


def rank_resume(path: str) -> dict[str, Any]:
    """The first call stops a run that has drawn every prompt and done nothing with them; the second resumes it."""
    from megatron_dypo.admission import books
    from megatron_dypo.config.load import load_config
    from megatron_dypo.run import open_run, save_checkpoint
    from megatron_dypo.types import DropReason

    with open_run(load_config(path, ["data.max_prompt_tokens=5"])) as run:
        leader = run.leader
        assert leader is not None
        if run.step == 0:
            prompts = len(leader.stream)
            leader.ledger.draw(prompts)
            leader.cursor, run.step = prompts, 1
            leader.unfinished = [SimpleNamespace(order=order) for order in range(prompts)]  # type: ignore[misc]
            run.optimizer.zero_grad()
            run.optimizer.step()  # of no gradients: only an optimizer that made a step can be stored
            save_checkpoint(run)
        return {
            "difference": books(run).difference,
            "drawn": leader.ledger.drawn,
            "too long": leader.ledger.dropped[DropReason.TOO_LONG],
            "unfinished": len(leader.unfinished),
        }


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
        eval={"prompts": [str(folder / "held_out.jsonl")]},
        rollout={"servers": {"python": str(python), "per_node": 2, "port": 32600}},
    )
    first, second = run_ranks(2, rank_open, str(config))
    assert len(set(first["urls"])) == 2
    assert second["urls"] == first["urls"]
    assert first["health"] == second["health"] == [200, 200]
    assert first["health after"] == [None, None], "servers stop with the run that started them"
    for found in (first, second):
        assert found["clients"] == [True, True]
        assert found["verifier"]
        assert (found["prompts"], found["held out"]) == (48, {"held_out": 16})
        assert found["reference"]
        assert found["background"] is None
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
    assert found["clients"] == [True, True]
    assert found["health after"] == [200], "nobody stops a server that the run did not start"


def test_a_run_that_asks_no_server_starts_none_and_needs_no_verifier(folder: Path) -> None:
    (found,) = run_ranks(1, rank_open, str(write_task(folder, objective={"name": "sft"})))
    assert found["urls"] == ()
    assert found["clients"] == [False, False]
    assert not found["verifier"]
    assert not found["reference"]
    assert (found["prompts"], found["held out"]) == (48, {})


def test_draws_that_a_resumed_run_makes_again_are_on_its_books_where_they_are_too_long(tmp_path: Path) -> None:
    config = str(write_task(tmp_path, objective={"name": "sft"}))
    (stopped,) = run_ranks(1, rank_resume, config)
    (resumed,) = run_ranks(1, rank_resume, config)
    assert (stopped["difference"], stopped["drawn"], stopped["unfinished"]) == (0, 48, 48)
    assert (resumed["difference"], resumed["drawn"]) == (0, 48)
    assert 0 < resumed["too long"] == 48 - resumed["unfinished"]
