"""Every fault in every phase in which it makes sense: the run ends as it must or goes on, and the model is the same.

A fault that ends a start is done in one phase after the other, each in a new start of the same run. All others are done
to one start, in each phase once. Every fault leaves a witness: one line, none for a run without faults.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e.commands import steps_of
from tests.support.e2e.parity_task import write_task
from tests.support.faults.injector import Injection
from tests.support.faults.matrix import LAYOUTS, PHASES, ROWS
from tests.support.faults.policy_server import PolicyServer, policy_servers
from tests.support.faults.ranks import Ended, start_ranks

STEPS, RANKS = 5, 2
DEADLINE_S = 300.0
"""Deadline of one start. It takes some seconds on an idle machine."""


@dataclass(kw_only=True)
class FaultyRun:
    """One run, its servers and its witness."""

    config: Path
    servers: Sequence[PolicyServer]

    @property
    def dir(self) -> Path:
        return self.config.parent / "run"

    def injection(self, kind: str, phase: str, rank: int, **options: Any) -> Injection:
        urls = tuple(server.url for server in self.servers)
        # Of all servers, so that the run must wait; else of one, so that the other one goes on.
        urls = urls if kind == "a server answers 503" else urls[:1]
        return Injection(
            kind=kind, phase=phase, rank=rank, urls=urls, witness=str(self.config.parent / "witness.jsonl"), **options
        )

    def start(
        self, injections: Sequence[Injection], while_running: Callable[[Sequence[Any]], None] = lambda processes: None
    ) -> Ended:
        return start_ranks(self.config, RANKS, injections, deadline_s=DEADLINE_S, while_running=while_running)

    def witnessed(self) -> list[dict[str, Any]]:
        path = self.config.parent / "witness.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def model(self) -> bytes:
        return (self.dir / "hf" / "model.safetensors").read_bytes()

    def books(self) -> dict[int, dict[str, float]]:
        """Return the ledger, the loss and the accuracies of every step."""
        kept = ("ledger/", "train/loss", "eval/", "train/grad_norm", "reward/")
        return {
            step: {name: value for name, value in record.items() if name.startswith(kept)}
            for step, record in steps_of(self.dir).items()
        }

    def num_without_verdict(self) -> float:
        """Return how many groups and responses a verifier had in its hands when it was killed."""
        names = ("rollout/groups_without_verdict", "eval/held_out/num_without_verdict")
        return sum(record.get(name, 0.0) for record in steps_of(self.dir).values() for name in names)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.dir / "logs").glob("rank_*.log")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a run in a layout."""
    with ExitStack() as stack:

        def make(layout: str) -> FaultyRun:
            folder = tmp_path_factory.mktemp("faults")
            servers = stack.enter_context(policy_servers(2, model_path=str(folder / "model")))
            config = write_task(
                folder,
                run={"steps": STEPS, "watchdog_s": 60.0},
                rollout={"servers": {"urls": [server.url for server in servers]}},
                refit={"transport": "disk", "deadline_s": 16.0},
                parallel={"num_processes": RANKS, **LAYOUTS[layout]},
                checkpoint={"every": 1},
                eval={"every": 1, "sets": {"held_out": {"path": str(folder / "held_out.jsonl"), "max_prompts": 4}}},
            )
            return FaultyRun(config=config, servers=servers)

        yield make


@pytest.fixture(scope="module")
def calm(runs: Any) -> Callable[[str], FaultyRun]:
    """Return a function that gives the run of a layout that meets no fault."""
    made: dict[str, FaultyRun] = {}

    def of(layout: str) -> FaultyRun:
        if layout not in made:
            made[layout] = runs(layout)
            assert made[layout].start([]).statuses == (0,) * RANKS
            assert made[layout].witnessed() == []
        return made[layout]

    return of


def cells(outcome: str, fast: Sequence[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(kind, layout, marks=() if (kind, layout) in fast else pytest.mark.slow)
        for kind, row in ROWS.items()
        for layout in LAYOUTS
        if row.outcome == outcome
    ]


def require_same(run: FaultyRun, calm: FaultyRun) -> None:
    assert run.books() == calm.books()
    assert run.model() == calm.model()


@pytest.mark.parametrize(("kind", "layout"), cells("ends", [("SIGKILL", "two tensor ranks")]))
def test_a_fault_that_ends_a_start_ends_it_on_every_rank_and_the_next_start_goes_on(
    runs: Any, calm: Any, kind: str, layout: str
) -> None:
    row, run = ROWS[kind], runs(layout)
    for number, phase in enumerate(row.phases):
        # The first rank alone writes the export of so small a model.
        victim = 0 if (kind, phase) == ("disk full", "export") else number % RANKS
        end = run.start([run.injection(kind, phase, victim)])
        assert len(run.witnessed()) == number + 1, end.output
        assert run.witnessed()[-1]["phase"] == phase
        assert end.statuses[victim] in row.victim, f"{phase}: {end.output}"
        assert end.statuses[1 - victim] in row.others, f"{phase}: {end.output}"
        assert end.since_s(run.witnessed()[-1]["time"]) < row.deadline_s, phase
    end = run.start([])
    assert end.statuses == (0,) * RANKS, end.output
    require_same(run, calm(layout))


@pytest.mark.parametrize(("kind", "layout"), cells("goes on", [("a server answers 503", "two replicas")]))
def test_a_run_goes_on_after_a_fault_and_ends_as_if_it_had_not_happened(
    runs: Any, calm: Any, kind: str, layout: str
) -> None:
    row, run = ROWS[kind], runs(layout)
    injections = [
        # Servers and verifiers are those of the first rank; a stopped rank is named by the other one.
        run.injection(kind, phase, 1 if kind == "SIGSTOP" else 0, after_step=PHASES.index(phase) // 2)
        for phase in row.phases
    ]
    named: list[int] = []

    def go_on_once_it_is_named(processes: Sequence[Any]) -> None:
        stalls = run.log().count("W megatron_dypo: stall: rank 1")
        if stalls > len(named):
            named.append(stalls)
            os.kill(processes[1].pid, signal.SIGCONT)

    end = run.start(injections, go_on_once_it_is_named if kind == "SIGSTOP" else lambda processes: None)
    assert end.statuses == (0,) * RANKS, end.output
    assert [one["phase"] for one in run.witnessed()] == list(row.phases)
    if kind == "SIGSTOP":
        assert len(named) == len(row.phases)
    if kind.startswith("a server"):
        assert sum(sum(server.refused.values()) for server in run.servers) >= len(row.phases)
    if not run.num_without_verdict():
        require_same(run, calm(layout))
