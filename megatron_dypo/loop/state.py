"""The state of a running run. Each part is complete when the run begins, and has one type on each kind of rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.eval.judging import grading_of_sets
from megatron_dypo.loop.bad_steps.dumper import Dumper
from megatron_dypo.loop.bad_steps.not_finite import BadSteps
from megatron_dypo.loop.books.accounts import Accounts
from megatron_dypo.loop.books.recorder import Recorder, Writer
from megatron_dypo.loop.books.slow_ranks import SlowRanks
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.collect import Collector
from megatron_dypo.loop.evaluate import Evaluator
from megatron_dypo.loop.logprobs import Logprobs
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.probe import Prober
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.resume import Checkpointer
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.loop.teacher import NoTeacher, Teacher
from megatron_dypo.loop.updater import Updater
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.base import Objective


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
    timings: Timings
    tally: Tally
    slow_ranks: SlowRanks = field(default_factory=SlowRanks)
    teacher: Teacher | NoTeacher = field(default_factory=NoTeacher)

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @property
    def start_of_weights(self) -> str:
        """The origin of the weights at the start of this run, for messages."""
        return "the checkpoint" if self.progress.step else f"model.hf_path={self.config.model.hf_path}"

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
            reads_entropy=self.objective.needs_old_entropy(),
            replay=self.config.objective.replay,
            is_asynchronous=self.config.rollout.mode == "async",
            tally=self.tally,
            timings=self.timings,
        )

    @property
    def collector(self) -> Collector:
        """The parts of this run that a collection uses."""
        config, batching = self.config, self.config.batching
        # The update of buffered traces makes one version more in each rollout batch.
        more = batching.max_staleness if self.objective.trace_buffer() else 0
        return Collector(
            replica=self.replica,
            servers=self.servers,
            objective=self.objective,
            logprobs=self.logprobs,
            ranks=self.ranks,
            rollout=config.rollout,
            batching=batching,
            max_version_lag=batching.max_version_lag + more,
            fail_truncated=config.grading.fail_truncated,
            max_prompt_tokens=config.data.max_prompt_tokens,
            seed=config.run.seed,
            total_steps=config.run.steps,
            tally=self.tally,
            timings=self.timings,
            teacher=self.teacher,
            journal=self.servers.journal,
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

    @property
    def prober(self) -> Prober:
        """The parts of this run that a probe uses."""
        return Prober(
            policy=self.policy,
            replica=self.replica,
            servers=self.servers,
            ranks=self.ranks,
            cfg=self.config.probe,
            objective=self.config.objective,
            group_size=self.config.rollout.group_size,
            run_dir=self.dir,
            offloads_servers=self.config.refit.offload_servers,
            timings=self.timings,
        )

    @property
    def updater(self) -> Updater:
        """The parts of this run that an update uses."""
        return Updater(
            policy=self.policy,
            objective=self.objective,
            logprobs=self.logprobs,
            replica=self.replica,
            ranks=self.ranks,
            reference=self.config.objective.reference,
            auto_alpha=self.config.objective.auto_alpha,
            bad_steps=BadSteps(
                policy=self.config.optimizer.on_bad_step,
                most_in_a_row=self.config.optimizer.max_bad_steps,
                max_rollbacks=self.config.optimizer.max_rollbacks,
                checkpoints=self.dir / CHECKPOINTS,
                verify=self.config.checkpoint.verify,
                dumper=Dumper(config=self.config),
                streams=self.objective.streams,
            ),
            old_is_rollout=self.config.old_logp.source == "server",
            tally=self.tally,
        )

    @property
    def recorder(self) -> Recorder:
        """The parts of this run that its record needs."""
        return Recorder(
            accounts=self.accounts,
            writer=self.writer,
            timings=self.timings,
            declared=self.objective.metrics,
            total_steps=self.config.run.steps,
            summary_every=self.config.logging.summary_every,
            slow_ranks=self.slow_ranks,
            run_dir=self.dir,
        )

    @property
    def checkpointer(self) -> Checkpointer:
        """The parts of this run that a checkpoint needs."""
        return Checkpointer(
            folder=self.dir / CHECKPOINTS,
            policy=self.policy,
            replica=self.replica,
            servers=self.servers,
            updater=self.updater,
            ranks=self.ranks,
            cfg=self.config.checkpoint,
            total_steps=self.config.run.steps,
            timings=self.timings,
        )
