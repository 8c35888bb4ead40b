"""A run with a real SGLang server is killed between two checkpoints, and asks again only for groups in flight."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.e2e.commands import DEADLINE_S, start, steps_of, train, wait_until
from tests.support.e2e.counting_proxy import CountingProxy
from tests.support.e2e.parity_task import write_task
from tests.support.journal_cases import journaled

STEPS = 4


@pytest.mark.slow
def test_a_killed_run_asks_a_real_server_only_for_the_groups_that_were_in_flight(
    tmp_path: Path, sglang_servers: Callable[..., ServerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = (
        write_task(
            tmp_path,
            num_prompts=400,
            run={"steps": STEPS},
            rollout={"max_in_flight": 2},
            checkpoint={"every": 0},
            export={"hf": False},
        ),
        tmp_path / "run",
    )
    pool = sglang_servers(tmp_path / "model")
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", pool.api_key or "")
    with CountingProxy(pool.urls[0]) as proxy:
        urls = f"rollout.servers.urls=[{proxy.url}]"
        process = start("train", config, urls)
        wait_until(process, lambda: 2 in steps_of(run_dir))
        num_finished = len(journaled(run_dir))
        wait_until(process, lambda: len(journaled(run_dir)) >= num_finished + 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
        before, finished, asked = steps_of(run_dir), journaled(run_dir), list(proxy.asked)
        assert not (run_dir / "checkpoints").exists(), "it was killed before its first checkpoint"
        proxy.asked.clear()

        output = train(config, urls)
        after = steps_of(run_dir)
        drawn = after[STEPS]["ledger/drawn"]
    assert f"the journal holds {len(finished)} finished groups of the run before" in output
    assert f"the journal of this run gave {len(finished)} finished groups; 0 in it did not fit" in output
    assert len(set(proxy.asked)) == len(proxy.asked) == drawn - len(finished)
    assert len(set(asked) | set(proxy.asked)) == drawn
    assert len(set(asked) & set(proxy.asked)) <= 2, "rollout.max_in_flight"
    assert sum(metrics.get("rollout/num_from_journal", 0.0) for metrics in after.values()) == len(finished)
    for step in (1, 2):
        for name in ("train/loss", "train/grad_norm", "rollout/reward", "ledger/drawn"):
            assert before[step][name] == after[step][name], (step, name)
    assert drawn == sum(
        value for name, value in after[STEPS].items() if name.startswith("ledger/") and "drawn" not in name
    )
