"""The state of a run while it lasts: each part is whole when the run begins, and has one type on each kind of rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.config.tree import Config
from megatron_dypo.eval.judging import grading_of_sets
from megatron_dypo.loop.books.accounts import Accounts
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.collect import Collector
from megatron_dypo.loop.evaluate import Evaluator
from megatron_dypo.loop.logprobs import Logprobs
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.base import Objective


class Writer(Protocol):
    """Writes a record of metrics for each step; see :class:`megatron_dypo.metrics.writer.MetricsWriter`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


class NoWriter:
    """Stands for the writer on all ranks but one."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(kw_only=True)
class Progress:
    """How far a run is; the same on every rank."""

    step: int = 0
    """Optimizer steps done; also the version of the weights."""
    batches: int = 0
    """Rollout batches begun."""
    bad_steps: int = 0
    """Updates in a row that were skipped because their gradients were not finite."""
    last_problem: str = ""
    """The reason of the last update that was skipped."""

    def count_update(self, problem: str | None) -> None:
        """Count an update; ``problem`` is the reason where it was skipped."""
        self.step += 1
        self.bad_steps = 0 if problem is None else self.bad_steps + 1
        self.last_problem = problem or self.last_problem


@dataclass(kw_only=True)
class Run:
    """One rank's view of a run."""

    config: Config
    ranks: Ranks
    policy: Policy
    objective: Objective
    replica: Replica
    servers: Servers | NoServers
    writer: Writer
    progress: Progress = field(default_factory=Progress)
    batch: RolloutBatch = field(default_factory=RolloutBatch)
    """The rollout batch that updates are being made from; used up: the next step collects one."""
    timings: Timings
    tally: Tally

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.dir / "checkpoints"

    @property
    def accounts(self) -> Accounts:
        """The books and counts of all replicas."""
        return Accounts(replica=self.replica, stream=self.servers.stream, ranks=self.ranks, tally=self.tally)

    @property
    def logprobs(self) -> Logprobs:
        """The computation of log-probs for this run's objective."""
        return Logprobs(
            policy=self.policy,
            cfg=self.config.old_logp,
            reads_reference=self.objective.needs_reference(),
            reads_current=self.objective.needs_current_logprobs(),
            is_asynchronous=self.config.rollout.mode == "async",
            tally=self.tally,
            timings=self.timings,
        )

    @property
    def collector(self) -> Collector:
        """The parts of this run that a collection uses."""
        config = self.config
        return Collector(
            replica=self.replica,
            servers=self.servers,
            objective=self.objective,
            logprobs=self.logprobs,
            ranks=self.ranks,
            rollout=config.rollout,
            batching=config.batching,
            fail_truncated=config.grading.fail_truncated,
            max_prompt_tokens=config.data.max_prompt_tokens,
            seed=config.run.seed,
            total_steps=config.run.steps,
            tally=self.tally,
            timings=self.timings,
        )

    @property
    def evaluator(self) -> Evaluator:
        """The parts of this run that an evaluation uses."""
        return Evaluator(
            replica=self.replica,
            servers=self.servers,
            ranks=self.ranks,
            cfg=self.config.eval,
            grading=grading_of_sets(self.config.grading, self.config.eval),
            timings=self.timings,
        )
