"""Runs of real ranks that are killed at random moments, again and again: they end as if they had not been."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e.commands import steps_of
from tests.support.e2e.parity_task import write_task
from tests.support.faults.policy_server import PolicyServer, policy_servers
from tests.support.faults.ranks import start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS, RANKS = 11, 2
STEPS = {"sft": 150, "sft, async": 150, "dypo": 40, "dypo, two replicas": 40, "dypo, async": 40}
"""Steps of each case: enough for all kills, since a step of SFT asks no server."""
LATEST_S = {"sft": 0.4, "sft, async": 0.4, "dypo": 1.5, "dypo, two replicas": 1.5, "dypo, async": 1.5}
"""Longest time from the end of a step to a kill."""
IN_FLIGHT = 8
"""Groups that one kill may lose: those of a collection."""
DEADLINE_S = 300.0
CASES: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"name": "sft"}},
    "sft, async": {"objective": {"name": "sft", "importance": {"cap": 2.0}}, "rollout": {"mode": "async"}},
    "dypo": {},
    "dypo, two replicas": {"parallel": {"num_processes": RANKS}, "checkpoint": {"every": 3}},
    "dypo, async": {"objective": {"importance": {"cap": 2.0}}, "rollout": {"mode": "async"}},
}
KEPT = ("train/loss", "train/grad_norm", "ledger/drawn", "reward/mean")


class Killer:
    """Kills one rank, or all, some time after a start has made a number of steps."""

    def __init__(self, run_dir: Path, draw: random.Random, latest_s: float) -> None:
        self._run_dir, self._draw, self._latest_s = run_dir, draw, latest_s
        self._wanted = len(steps_of(run_dir)) + draw.randrange(0, 4)
        self._at: float | None = None
        self.is_done = False

    def __call__(self, processes: Sequence[Any]) -> None:
        if self.is_done or len(steps_of(self._run_dir)) < self._wanted:
            return
        if self._at is None:
            self._at = time.monotonic() + self._draw.uniform(0.0, self._latest_s)
        if time.monotonic() >= self._at:
            alive = [process.pid for process in processes if process.is_alive()]
            if len(alive) < len(processes):
                return
            for pid in self._draw.choice([alive, alive[:1], alive[1:]]):
                os.kill(pid, signal.SIGKILL)
            self.is_done = True


def of(run_dir: Path) -> dict[int, list[float | None]]:
    return {step: [record.get(name) for name in KEPT] for step, record in steps_of(run_dir).items()}


def task(folder: Path, case: str, servers: Sequence[PolicyServer]) -> Path:
    sections = {
        "rollout": {},
        "parallel": {"num_processes": RANKS, "tensor": 2},
        "checkpoint": {"every": 3, "async_save": True},
        **CASES[case],
    }
    rollout = {"servers": {"urls": [server.url for server in servers]}, **sections.pop("rollout")}
    return write_task(
        folder,
        run={"steps": STEPS[case]},
        rollout=rollout,
        refit={"transport": "disk"},
        **sections,
    )


def generated(servers: Sequence[PolicyServer]) -> int:
    return sum(path == "/generate" for server in servers for path, _ in server.calls)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not(tmp_path: Path, case: str) -> None:
    draw, kills, seen = random.Random(case), 0, dict[int, list[float | None]]()
    with policy_servers(2, model_path=str(tmp_path / "killed" / "model")) as servers:
        (tmp_path / "killed").mkdir()
        config = task(tmp_path / "killed", case, servers)
        run_dir = config.parent / "run"
        while True:
            killer = Killer(run_dir, draw, LATEST_S[case])
            end = start_ranks(
                config,
                RANKS,
                [],
                deadline_s=DEADLINE_S,
                while_running=killer if kills < KILLS else lambda _: None,
                ends_others_after_s=20.0,  # a rank that was not there yet cannot be missed
            )
            # A step that is made again is the same step.
            seen |= {step: values for step, values in of(run_dir).items() if step not in seen}
            if not killer.is_done:
                break
            kills += 1
            assert -signal.SIGKILL in end.statuses, end.output
        assert end.statuses == (0,) * RANKS, end.output
        asked = generated(servers)
    assert kills == KILLS
    again = of(run_dir)
    assert again.keys() == seen.keys()
    assert sorted(seen)[-1] == STEPS[case]
    is_timed = case == "dypo, async"  # in a stream of groups it depends on time how many prompts are drawn by a step
    assert {step: of_step[:2] if is_timed else of_step for step, of_step in again.items()} == {
        step: of_step[:2] if is_timed else of_step for step, of_step in seen.items()
    }
    for record in steps_of(run_dir).values():
        accounts = {name: value for name, value in record.items() if name.startswith("ledger/")}
        assert accounts.pop("ledger/drawn", 0.0) == sum(accounts.values())
    if is_timed:  # so does which groups a batch gets: a calm run has others
        return
    with policy_servers(2, model_path=str(tmp_path / "calm" / "model")) as servers:
        (tmp_path / "calm").mkdir()
        config = task(tmp_path / "calm", case, servers)
        end = start_ranks(config, RANKS, [], deadline_s=DEADLINE_S)
        assert end.statuses == (0,) * RANKS, end.output
        assert asked <= generated(servers) + KILLS * IN_FLIGHT, "finished groups are made once"
    assert of(run_dir) == of(config.parent / "run")
    model = Path("hf") / "model.safetensors"
    assert (run_dir / model).read_bytes() == (config.parent / "run" / model).read_bytes()
