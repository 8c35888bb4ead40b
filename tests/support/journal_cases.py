"""Runs of the loop that are killed at a chosen moment and go on from their last checkpoint and their journals."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.batching.wire import dump_samples
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.journal.found import folders, segments
from megatron_dypo.loop.journal.records import Logged, load
from megatron_dypo.loop.journal.segment import Ending, scan
from megatron_dypo.loop.policy import UpdateReport
from megatron_dypo.loop.replica import Leader
from megatron_dypo.loop.resume import restore_batch, restore_draws
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.train import train_run
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.types import Prompt, Sample, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import FakePolicy, Prompts, Refits, ThreadRanks, make_run, mixed, run_in_threads

FIRST_TOKEN = 1000
"""First token of the prompt of draw 0; that of draw n is n more."""


class Killed(BaseException):
    """The end of a process, as far as its own code sees it."""


class Ticks:
    """Counts the moments of an attempt, over all of its threads, and ends it at moment ``at``; None: it goes on."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self._at, self._lock = 0, at, threading.Lock()
        self.runs = list[Run]()

    @property
    def is_dead(self) -> bool:
        return self._at is not None and self.count > self._at

    def tick(self) -> None:
        """Pass one moment. Raise Killed at the last one, and at all later ones."""
        self.pass_silently()
        if self.is_dead:
            raise Killed

    def pass_silently(self) -> None:
        """Pass one moment in a thread that cannot be ended. A dead run writes no journal."""
        with self._lock:
            self.count += 1
            if self.is_dead:
                for run in self.runs:
                    run.servers.journal.close()


class DrawPrompts(Prompts):
    """Prompts whose first token tells the draw."""

    def prompt(self, order: int) -> Prompt:
        prompt = super().prompt(order)
        tokens = np.array([FIRST_TOKEN + order, *prompt.tokens[1:]], np.int32)
        return Prompt(**{**vars(prompt), "tokens": tokens})


class MortalPolicy(FakePolicy):
    """A policy whose every call is a moment. It goes on from ``stored``."""

    def __init__(self, ticks: Ticks, ranks: ThreadRanks, stored: Stored | None, *, drift: float) -> None:
        super().__init__(is_leader=ranks.is_leader)
        self._ticks, self._ranks, self._drift = ticks, ranks, drift
        self.versions: dict[int, str] = {}
        """Version → its digest."""
        self.learned: dict[int, set[int]] = {}
        """Version → draws that its update learned from."""
        self._histories: dict[int, str] = {}
        """Step of a checkpoint → digest of its weights."""
        if stored is not None:
            self.version, self.history = stored.step, stored.history

    def update(self, weighted: Sequence[Sample]) -> UpdateReport:
        self._ticks.tick()
        before, report = self.history, super().update(weighted)
        parts = [f"{before} {self._drift}".encode(), *self._ranks.of_leaders(dump_samples(weighted))]
        self.history = hashlib.sha256(b"".join(parts)).hexdigest()
        self.versions[self.version] = self.history
        self.learned[self.version] = {sample.order for sample in weighted}
        self._ticks.tick()
        return report

    def logprobs(self, samples: Sequence[Sample]) -> list[Any]:
        self._ticks.tick()
        return super().logprobs(samples)

    def save(self, root: Path, step: int, **options: Any) -> Path:
        self._ticks.tick()
        self._histories[step] = self.history
        folder = super().save(root, step, **options)
        self._ticks.tick()
        return folder

    def _publish(self, folder: Path, step: int, state: dict[str, Any], on_publish: Callable[[], object]) -> None:
        def on_every_rank() -> None:
            self._ranks.any_rank(False)  # a real checkpoint is there once every rank has written its part
            on_publish()

        super()._publish(folder, step, {**state, "history": self._histories[step]}, on_every_rank)


class JointRefits(Refits):
    """A refit begins once every rank has come to it, and ends on all ranks together, as a real one."""

    def __init__(self, ranks: ThreadRanks, fake: FakeSGLang) -> None:
        super().__init__(fakes=[fake] if ranks.is_global_leader else [], urls=[fake.url])
        self._ranks = ranks

    def refit(self, version: int) -> RefitReport:
        self._ranks.any_rank(False)
        report = super().refit(version)
        self._ranks.any_rank(False)
        return report


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint in memory."""

    step: int
    history: str
    trainer_state: dict[str, Any]
    leader_states: list[bytes]


@dataclass(kw_only=True)
class Attempt:
    """One attempt of a run: from a checkpoint, if there is one, to its end or its kill."""

    config: Config
    world: tuple[int, int] = (1, 1)
    """Ranks, and ranks of a replica."""
    kill_at: int | None = None
    stored: Stored | None = None
    plan: Any = None
    drift: float = 0.0
    """Makes other weights of the same updates."""
    ticks: Ticks = field(init=False)
    runs: list[Run] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """Orders of the draws that servers were asked for, in the order of the requests."""
    is_killed: bool = False

    def make(self) -> Attempt:
        """Make the attempt; return it."""
        self.ticks = Ticks(self.kill_at)
        size, ranks_per_replica = self.world
        with FakeSGLang(self._arrive) as fake:
            self.runs = run_in_threads(size, lambda ranks: self._rank(ranks, fake), ranks_per_replica)
        self.asked = [body["input_ids"][0] - FIRST_TOKEN for body in fake.requests]
        self.is_killed = self.ticks.is_dead
        return self

    def _arrive(self, index: int, body: dict[str, Any]) -> Any:
        self.ticks.pass_silently()
        return self.plan(index, body) if self.plan else "ok"

    def _rank(self, ranks: ThreadRanks, fake: FakeSGLang) -> Run:
        policy = MortalPolicy(self.ticks, ranks, self.stored, drift=self.drift)
        run = make_run(
            [fake.url],
            self.config,
            judge=self._judge,
            prompts=DrawPrompts(),
            ranks=ranks,
            refitter=JointRefits(ranks, fake),
            policy=policy,
            restored=self.stored,
        )
        self.ticks.runs.append(run)
        if self.stored is not None:
            self._restore(run, self.stored)
        try:
            with suppress(Killed, threading.BrokenBarrierError):
                train_run(run)
            if self.ticks.is_dead:
                ranks.meeting.abort()  # the other ranks are killed too
        finally:
            run.servers.stream.stop()
            run.servers.journal.close()
        return run

    def _judge(self, row: int, member: int) -> Verdict:
        self.ticks.tick()
        return mixed(row, member)

    @staticmethod
    def _restore(run: Run, stored: Stored) -> None:
        state = stored.trainer_state
        if isinstance(run.replica, Leader):
            restore_draws(run.replica.draws, state)
            run.replica.books.ledger = run.replica.draws.ledger
        run.progress.batch = restore_batch(stored, run.replica, Path("checkpoint"))
        run.progress.step, run.progress.batches = stored.step, state["batches"]

    @property
    def checkpoint(self) -> Stored | None:
        """The last checkpoint that all replicas have written, of this attempt or before it."""
        saved = [policy.saved for policy in self.policies]
        steps = set.intersection(*(set(one) for one in saved))
        if not steps:
            return self.stored
        step = max(steps)
        return Stored(
            step=step,
            history=saved[0][step]["history"],
            trainer_state=saved[0][step]["trainer_state"],
            leader_states=[state for one in saved for state in one[step]["leader_states"]],
        )

    @property
    def policies(self) -> list[MortalPolicy]:
        """The policy of each replica's leader."""
        return [
            run.policy for run in self.runs if isinstance(run.replica, Leader) and isinstance(run.policy, MortalPolicy)
        ]

    @property
    def versions(self) -> Mapping[int, str]:
        """Version → digest of all that was learned up to it."""
        return self.policies[0].versions

    @property
    def learned(self) -> dict[int, list[int]]:
        """Version → draws that its update learned from, over all replicas."""
        steps = set.intersection(*(set(policy.learned) for policy in self.policies))
        return {step: sorted(order for policy in self.policies for order in policy.learned[step]) for step in steps}


def journaled(run_dir: Path) -> set[int]:
    """Return the orders of all groups that the journals in a run folder hold."""
    items = [item for folder in folders(run_dir / "journal") for path in segments(folder) for item in scan(path)]
    records = [load(item[1]) for item in items if not isinstance(item, Ending)]
    return {record.order for record in records if isinstance(record, Logged)}
