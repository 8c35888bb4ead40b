"""The record of a run: metrics of each step, a line for the terminal, and the progress in ``status.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_dypo.loop.books.accounts import Accounts
from megatron_dypo.loop.books.slow_ranks import SlowRanks
from megatron_dypo.loop.books.step_metrics import rollout_metrics, step_metrics
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.updater import Update
from megatron_dypo.metrics.writer import Timings, summary_line
from megatron_dypo.objective.metrics import SumMetric
from megatron_dypo.processes.heartbeats import read_heartbeat

log = logging.getLogger("megatron_dypo")
_CLOCK_STEP_S = 2.0
"""Seconds by which a clock is set that are worth a line. Clocks that are kept in time are set by less."""


class Writer(Protocol):
    """Writes a record of metrics for each step; see :class:`megatron_dypo.metrics.writer.MetricsWriter`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


class NoWriter:
    """The writer on all ranks except one: it writes nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Writes the record of a run. All ranks call every method."""

    accounts: Accounts
    writer: Writer
    timings: Timings
    declared: Sequence[SumMetric]
    """The objective's own metrics."""
    total_steps: int
    summary_every: int
    """Steps from one summary line to the next; see ``LoggingConfig``."""
    slow_ranks: SlowRanks
    run_dir: Path

    def report(self, progress: Progress) -> dict[str, float]:
        """Write the progress of the run to ``status.json``; return the metrics of the books. Collective over the
        world."""
        return self.accounts.report(progress.step, self.total_steps, progress.batch).metrics()

    def gather(self, progress: Progress, update: Update) -> dict[str, float]:
        """Return the counts and times of the step of ``update``, and reset them. Collective over the world."""
        tally, timings, world_size = self.accounts.take_tally(), self.timings.take(), self.accounts.ranks.world_size
        metrics = step_metrics(tally, timings, update.totals, update.report.sums, self.declared, world_size)
        metrics |= self.slow_ranks.look(update.report.busy_s, update.report.work)
        if self.accounts.ranks.is_global_leader:
            self.slow_ranks.warn(progress.step, metrics, self._name_of)
            if abs(seconds := metrics["perf/clock_step_s"]) > _CLOCK_STEP_S:
                log.warning("step %d: the time of day was set by %+.0f s; no deadline reads it", progress.step, seconds)
        return metrics | self.report(progress)

    def _name_of(self, rank: int) -> str:
        """Return a rank with its host and process, which its heartbeat has."""
        beat = read_heartbeat(self.run_dir, rank)
        return f"rank {rank}" if beat is None else beat.name()

    def summarize(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the summary line of ``step``, if one is due."""
        is_due = step == self.total_steps or step % self.summary_every == 0
        if is_due and self.accounts.ranks.is_global_leader:
            log.info(summary_line(step, metrics))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the record of ``step``, with times measured since :meth:`gather`."""
        self.writer.write(step, {**metrics, **self.timings.take()})

    def write_unfinished(self, progress: Progress) -> None:
        """Write the counts of a collection that led to no update, as the record of the step it was for."""
        timings, tally = self.timings.take(), self.accounts.take_tally()
        books = self.report(progress)
        if tally["asked"] or tally["dropped_prompts"]:
            self.writer.write(progress.step + 1, rollout_metrics(tally) | timings | books)

    def log(self, progress: Progress) -> None:
        """Call :meth:`report`, and log the result."""
        self.accounts.log(progress.step, self.total_steps, progress.batch)
