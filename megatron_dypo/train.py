"""The loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.config import Config
from megatron_dypo.evaluate import evaluate
from megatron_dypo.mcore.chunks import named_global_parameters
from megatron_dypo.metrics import summary_line
from megatron_dypo.parallel.device import peak_memory_gib
from megatron_dypo.run import Run, open_run, save_checkpoint
from megatron_dypo.stages import fill_queues, push, rescore_stale, score, take_batch, update, weigh
from megatron_dypo.tally import Tally, performance_metrics, rollout_metrics, update_metrics
from megatron_dypo.weights.export import export_hf

log = logging.getLogger("megatron_dypo")


def train(config: Config) -> None:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run."""
    with open_run(config) as run:
        push(run)
        if run.step == 0:
            _write(run, evaluate(run))
        run.timings.take()
        while run.step < config.run.steps and train_step(run):
            pass
        finish(run)


def train_step(run: Run) -> bool:
    """One optimizer step, its metrics and what is due after it; False when nothing was left to learn from."""
    with run.timings.measure("step"):
        fill_queues(run)
        score(run)
        batch = take_batch(run)
        if batch is None:
            log.info("step %d: every prompt is Easy or without a teacher; nothing is left to learn from", run.step)
            return False
        rescore_stale(run, batch)
        samples = weigh(run, batch)
        sums, metrics = update(run, samples)
        run.step += 1
        metrics |= push(run)
    timings, tally = run.timings.take(), _total_tally(run)
    metrics |= rollout_metrics(tally) | update_metrics(tally, batch.totals, sums)
    metrics |= timings | performance_metrics(tally, timings, run.layout.world_size)
    metrics["perf/peak_memory_gib"] = peak_memory_gib()
    after_step(run, metrics)
    return True


def after_step(run: Run, metrics: dict[str, float]) -> None:
    """Refresh the reference and evaluate where the config says so, write the step's metrics, save.

    The time of a checkpoint stands in the metrics of the step after it.
    """
    config = run.config
    is_last = run.step == config.run.steps
    reference = config.objective.reference
    if run.reference and reference.mode == "refreshed" and run.step % reference.refresh_every == 0:
        run.reference.capture()
    if run.layout.is_global_leader:
        log.info(summary_line(run.step, metrics))
    if is_last or (config.eval.every and run.step % config.eval.every == 0):
        metrics |= evaluate(run)
    # Before the checkpoint: a run that resumes from it finds the step's metrics written.
    _write(run, metrics | run.timings.take())
    if is_last or (config.checkpoint.every and run.step % config.checkpoint.every == 0):
        with run.timings.measure("save_checkpoint"):
            save_checkpoint(run)


def finish(run: Run) -> None:
    """Export the trained policy."""
    layout = run.layout
    if run.config.export.hf:
        export_hf(
            named_global_parameters(run.chunks),
            run.arch,
            tp_rank=layout.tp_rank,
            tp_size=layout.tensor,
            tp_group=layout.tp_group,
            pp_rank=layout.pp_rank,
            pp_size=layout.pipeline,
            control_group=layout.policy_group,
            write=layout.dp_rank == 0 and layout.cp_rank == 0,
            out_dir=run.dir / "hf",
            reference_hf_path=run.config.model.hf_path,
        )
    if layout.is_global_leader:
        log.info("done: %d steps; run folder %s", run.step, run.dir)


def _write(run: Run, metrics: Mapping[str, float]) -> None:
    if run.writer and metrics:
        run.writer.write(run.step, metrics)


def _total_tally(run: Run) -> Tally:
    """The step's counts over all leaders, on the leaders; the rank's own counters start again at zero."""
    mine, run.tally = run.tally, Tally()
    if run.leader is None:
        return mine
    total = Tally()
    for tally in gather_objects(mine, run.leader.group):
        total.merge(tally)
    return total
