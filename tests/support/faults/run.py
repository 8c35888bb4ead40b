"""A run under faults: its folder, its stand-in servers, its witnesses, and the places in which it tells of faults."""

from __future__ import annotations

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dypo.metrics.records import read_metrics
from tests.support.e2e.commands import steps_of
from tests.support.e2e.parity_task import write_task
from tests.support.faults.injector import Injection
from tests.support.faults.matrix import LAYOUTS, Metric, Told
from tests.support.faults.policy_server import PolicyServer
from tests.support.faults.ranks import Ended, start_ranks

STEPS, RANKS = 5, 2
DEADLINE_S = 600.0
"""Deadline of one start. It takes some seconds on an idle machine, and half a minute more for each rank that stops."""


@dataclass(kw_only=True)
class FaultyRun:
    """One run, its servers and its witness."""

    config: Path
    servers: Sequence[PolicyServer]
    recorded_at: dict[int, float] = field(default_factory=dict)
    """Step → moment, on the monotonic clock, at which its record was seen, if :meth:`see_records` was called."""

    @property
    def dir(self) -> Path:
        return self.config.parent / "run"

    def injection(self, kind: str, phase: str, rank: int, **options: Any) -> Injection:
        # Of all servers, so that the run must wait; else of one, so that the other one goes on.
        failing = self.servers if kind == "a server answers 503" else self.servers[:1]
        return Injection(
            kind=kind,
            phase=phase,
            rank=rank,
            urls=tuple(server.url for server in failing) if kind.startswith("a server") else (),
            witness=str(self.config.parent / "witness.jsonl"),
            **options,
        )

    def start(
        self, injections: Sequence[Injection], while_running: Callable[[Sequence[Any]], None] = lambda processes: None
    ) -> Ended:
        return start_ranks(self.config, RANKS, injections, deadline_s=DEADLINE_S, while_running=while_running)

    def see_records(self) -> None:
        """Note the moment at which the record of each step is there."""
        for step in steps_of(self.dir):
            self.recorded_at.setdefault(step, time.monotonic())

    def witnessed(self) -> list[dict[str, Any]]:
        path = self.config.parent / "witness.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def silences_s(self, end: Ended) -> list[float]:
        """Return, for each witness, the time from it to the next sign of life: the next witness, the record of a step
        that was not made yet, or the end of the run.
        """
        seen, silences = self.witnessed(), []
        for number, one in enumerate(seen):
            # A rank may be ahead of the one that writes the record of the step before.
            first = one["steps"] + (one["phase"] in ("save", "export"))
            signs = [at for step, at in self.recorded_at.items() if step >= first and at > one["at"]]
            signs += [later["at"] for later in seen[number + 1 : number + 2]]
            silences.append(min([*signs, end.ended_at]) - one["at"])
        return silences

    def usual_step_s(self) -> float:
        return statistics.median(record["timing_s/step"] for step, record in steps_of(self.dir).items() if step)

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

    def tells(self, place: Told | Metric, end: Ended, victim: int) -> bool:
        """Return whether a user sees a fault of the rank ``victim`` in a place, after a start ended with ``end``."""
        if isinstance(place, Metric):
            records = read_metrics(self.dir / "metrics.jsonl")
            return any((record.get(place.name) or 0.0) >= place.at_least for record in records)
        today = datetime.datetime.now().astimezone()
        later = "|".join(f"{today + datetime.timedelta(days=days):%Y-%m-%d}" for days in range(2, 20))
        pattern = place.pattern.format(victim=victim, later=f"({later})")
        return re.search(pattern, self._text_of(place, end), re.MULTILINE) is not None

    def _text_of(self, place: Told, end: Ended) -> str:
        if place.where == "the log":
            return self.log()
        if place.where == "the terminal":
            return end.output
        status = json.loads((self.dir / "status.json").read_text())
        return f"{status['cause']}, rank {status['rank']}: {status['message']}"


def make_run(folder: Path, layout: str, servers: Sequence[PolicyServer]) -> FaultyRun:
    """Write a run of the parity task in a layout of the matrix."""
    config = write_task(
        folder,
        run={"steps": STEPS, "watchdog_s": 60.0},
        rollout={"servers": {"urls": [server.url for server in servers]}},
        refit={"transport": "disk", "deadline_s": 16.0},
        parallel={"num_processes": RANKS, **LAYOUTS[layout]},
        optimizer={"lr": 1e-3, "on_bad_step": "stop"},
        checkpoint={"every": 1},
        eval={"every": 1, "sets": {"held_out": {"path": str(folder / "held_out.jsonl"), "max_prompts": 4}}},
    )
    return FaultyRun(config=config, servers=servers)


def require_same(run: FaultyRun, calm: FaultyRun) -> None:
    """Require that books, losses, accuracies and the exported model are those of the run without faults."""
    assert run.books() == calm.books()
    assert run.model() == calm.model()
