"""The loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.collecting import fill_queues
from megatron_dypo.config.tree import Config
from megatron_dypo.evaluate import evaluate
from megatron_dypo.mcore.checkpoint_folder import find_latest, step_of
from megatron_dypo.mcore.fp8 import named_values
from megatron_dypo.metrics import summary_line
from megatron_dypo.parallel.agree import any_rank
from megatron_dypo.parallel.device import peak_memory_gib
from megatron_dypo.preemption import is_requested
from megatron_dypo.run import Run, open_run, save_checkpoint
from megatron_dypo.scoring import rescore_stale, score
from megatron_dypo.serving import push, release
from megatron_dypo.stages import open_batch, take_batch, update, weigh
from megatron_dypo.tally import Tally, performance_metrics, rollout_metrics, update_metrics
from megatron_dypo.weights.export import export_hf

log = logging.getLogger("megatron_dypo")


def train(config: Config) -> bool:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run.

    Returns:
        False when a rank was asked to stop before the last step (see :mod:`megatron_dypo.preemption`): what was done
        is in a checkpoint, from which the next start of the same run goes on.
    """
    with open_run(config) as run:
        push(run)
        if run.step == 0:
            _write(run, evaluate(run))
        run.timings.take()
        while run.step < config.run.steps:
            if any_rank(is_requested()):
                stop(run)
                return False
            if not train_step(run):
                break
        finish(run)
    return True


def train_step(run: Run) -> bool:
    """One optimizer step, its metrics and what is due after it; False when nothing was left to learn from.

    The first step of a rollout batch collects it; the servers get the weights after its last, or for an evaluation.
    """
    with run.timings.measure("step"):
        if not run.is_mid_batch:
            fill_queues(run)
            release(run)
            open_batch(run)
            score(run)
            run.batches += 1
        batch = take_batch(run)
        if batch is None:
            log.info("step %d: every prompt is Easy or without a teacher; nothing is left to learn from", run.step)
            return False
        rescore_stale(run, batch)
        samples = weigh(run, batch)
        sums, metrics = update(run, samples)
        run.step += 1
        run.is_mid_batch = not batch.is_last
        if batch.is_last or _evaluation_is_due(run):
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
    if run.layout.is_global_leader and (is_last or run.step % config.logging.summary_every == 0):
        log.info(summary_line(run.step, metrics))
    if _evaluation_is_due(run):
        metrics |= evaluate(run)
    # Before the checkpoint: a run that resumes from it finds the step's metrics written.
    _write(run, metrics | run.timings.take())
    if is_last or (config.checkpoint.every and run.step % config.checkpoint.every == 0):
        with run.timings.measure("save_checkpoint"):
            save_checkpoint(run)


def stop(run: Run) -> None:
    """Save what was done since the last checkpoint, if anything was, so that the run can go on elsewhere."""
    if run.step > 0:
        _save_unless_saved(run)
    if run.layout.is_global_leader:
        log.info("stopped on request: %d of %d steps are done", run.step, run.config.run.steps)


def finish(run: Run) -> None:
    """Save the policy of a run that ended early, and export it."""
    layout = run.layout
    _save_unless_saved(run)
    if run.config.export.hf:
        export_hf(
            named_values(run.chunks),
            run.arch,
            layout,
            out_dir=run.dir / "hf",
            reference_hf_path=run.config.model.hf_path,
        )
    if layout.is_global_leader:
        log.info("done: %d steps; run folder %s", run.step, run.dir)


def _save_unless_saved(run: Run) -> None:
    latest = find_latest(run.dir / "checkpoints")
    if latest is None or step_of(latest) != run.step:
        save_checkpoint(run)


def _evaluation_is_due(run: Run) -> bool:
    cfg = run.config
    is_due = run.step == cfg.run.steps or (cfg.eval.every > 0 and run.step % cfg.eval.every == 0)
    return is_due and bool(cfg.eval.prompts)


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
