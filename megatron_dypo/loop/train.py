"""The loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.admission import books
from megatron_dypo.loop.collect import fill_queues
from megatron_dypo.loop.evaluate import evaluate
from megatron_dypo.loop.ledger import Balance
from megatron_dypo.loop.logprobs import rescore_stale, score
from megatron_dypo.loop.not_finite import bad_weight, explain_bad_update
from megatron_dypo.loop.run import Run, open_run, save_checkpoint
from megatron_dypo.loop.servers import push, release
from megatron_dypo.loop.tally import Tally, performance_metrics, rollout_metrics, update_metrics
from megatron_dypo.loop.update import UpdateReport, open_batch, take_batch, update, weigh
from megatron_dypo.mcore.checkpoints.folder import find_latest, step_of
from megatron_dypo.mcore.fp8 import named_values
from megatron_dypo.metrics import status
from megatron_dypo.metrics.writer import summary_line
from megatron_dypo.models.export import export_hf
from megatron_dypo.parallel.collectives import any_rank, gather_objects
from megatron_dypo.parallel.device import peak_memory_gib
from megatron_dypo.processes.stop_requests import is_requested
from megatron_dypo.processes.watchdog import mark

log = logging.getLogger("megatron_dypo")


def train(config: Config) -> None:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run.

    Raises:
        RunEnded: on all ranks: the run ended before that, for its cause. What was done is in a checkpoint, unless the
            weights are not finite. A model is exported only if the run was trained until nothing was left to learn.
    """
    with open_run(config) as run:
        try:
            _train(run)
        except RunEnded as end:
            _end(run, end)
            raise
        finish(run)


def _train(run: Run) -> None:
    mark("checking weights")
    _require_finite_weights(run)
    _report(run)
    push(run)
    if run.step == 0:
        _write(run, evaluate(run))
    run.timings.take()
    while run.step < run.config.run.steps:
        if any_rank(is_requested()):
            raise RunEnded(Cause.STOPPED, f"stopped on request; what was done is in {run.dir}/checkpoints")
        train_step(run)
    if run.bad_steps:
        raise RunEnded(
            Cause.NOT_FINITE, f"the last {run.bad_steps} updates of the run were skipped: {run.last_problem}"
        )


def train_step(run: Run) -> None:
    """One optimizer step, its metrics and what is due after it.

    The first step of a rollout batch collects it; the servers get the weights after its last, or for an evaluation.

    Raises:
        RunEnded: on all ranks: nothing can be learned from what was collected, or updates are not finite.
    """
    with run.timings.measure("step"):
        if not run.is_mid_batch:
            mark("collecting rollouts")
            fill_queues(run)
            release(run)
            open_batch(run)
            mark("computing log-probs")
            score(run)
            run.batches += 1
        batch = take_batch(run)
        mark("updating")
        rescore_stale(run, batch)
        samples = weigh(run, batch)
        report = update(run, samples)
        run.step += 1
        run.is_mid_batch = not batch.is_last
        metrics = report.metrics
        end = count_bad_steps(run, report)
        if end is None and (batch.is_last or _evaluation_is_due(run)):
            mark("pushing weights")
            metrics |= push(run)
    timings, tally = run.timings.take(), _total_tally(run)
    metrics |= rollout_metrics(tally) | update_metrics(tally, batch.totals, report.sums, run.objective.metrics)
    metrics |= timings | performance_metrics(tally, timings, run.layout.world_size)
    metrics |= _report(run).metrics()
    metrics["perf/peak_memory_gib"] = peak_memory_gib()
    if end is not None:
        _write(run, metrics)
        raise end
    after_step(run, metrics)


def count_bad_steps(run: Run, report: UpdateReport) -> RunEnded | None:
    """Count an update that was skipped; the end of the run where too many were, or where the weights themselves are bad."""
    if report.is_applied:
        run.bad_steps = 0
        return None
    run.bad_steps += 1
    run.last_problem, has_bad_weights = explain_bad_update(run, report.samples)
    if run.layout.is_global_leader:
        norm = report.metrics["train/grad_norm"]
        log.warning("step %d: gradient norm %s; update skipped: %s", run.step, norm, run.last_problem)
    if not has_bad_weights and run.bad_steps < run.config.optimizer.max_bad_steps:
        return None
    skipped = "an update was" if run.bad_steps == 1 else f"{run.bad_steps} updates in a row were"
    return RunEnded(Cause.NOT_FINITE, f"step {run.step}: {skipped} skipped: {run.last_problem}")


def after_step(run: Run, metrics: dict[str, float]) -> None:
    """Refresh the reference and evaluate where the config says so, write the step's metrics, save.

    The time of a checkpoint stands in the metrics of the step after it.
    """
    config = run.config
    is_last = run.step == config.run.steps
    if run.reference and config.objective.reference.is_refreshed_after(run.step):
        run.reference.capture()
    if run.layout.is_global_leader and (is_last or run.step % config.logging.summary_every == 0):
        log.info(summary_line(run.step, metrics))
    if _evaluation_is_due(run):
        mark("evaluating")
        metrics |= evaluate(run)
    # Before the checkpoint: a run that resumes from it finds the step's metrics written.
    _write(run, metrics | run.timings.take())
    is_due = is_last or (config.checkpoint.every > 0 and run.step % config.checkpoint.every == 0)
    if is_due and run.bad_steps == 0:
        mark("saving a checkpoint")
        with run.timings.measure("save_checkpoint"):
            save_checkpoint(run)


def finish(run: Run) -> None:
    """Save the policy, if that is not done yet, and export it."""
    mark("saving and exporting")
    _save_unless_saved(run)
    if run.config.export.hf:
        export_hf(
            named_values(run.chunks),
            run.arch,
            run.layout,
            out_dir=run.dir / "hf",
            reference_hf_path=run.config.model.hf_path,
        )
    _log_ledger(run)


def _end(run: Run, end: RunEnded) -> None:
    """Keep what a run did that ends before its last step. Collective over the world."""
    _write_unfinished_step(run)
    if end.cause is Cause.NOTHING_LEFT and run.step > 0:
        finish(run)
        return
    if run.step > 0 and end.cause is not Cause.NOT_FINITE:
        _save_unless_saved(run)
    _log_ledger(run)


def _log_ledger(run: Run) -> None:
    line = _report(run).line()
    if run.layout.is_global_leader:
        log.info("%d of %d steps are done; %s", run.step, run.config.run.steps, line)


def _write_unfinished_step(run: Run) -> None:
    """Write what a collection counted from which no update was made, as the record of the step that it was for."""
    timings, tally = run.timings.take(), _total_tally(run)
    metrics = rollout_metrics(tally)
    if tally["asked"] or tally["dropped_prompts"]:
        _write(run, metrics | timings | _books(run).metrics(), step=run.step + 1)


def _report(run: Run) -> Balance:
    """Tell ``status.json`` how far the run is; the ledger over all replicas, on the leaders."""
    found = _books(run)
    counts = found.counts() if run.leader else {}
    status.report(step=run.step, steps=run.config.run.steps, counts=counts)
    return found


def _books(run: Run) -> Balance:
    """The ledger over all replicas, on the leaders; draws that are on no account, or on several, are a bug of ours."""
    found = books(run)
    if found.difference and run.layout.is_global_leader:
        log.error(
            "the ledger of prompts does not balance by %d: please report this; %s", found.difference, found.line()
        )
    return found


def _require_finite_weights(run: Run) -> None:
    if name := bad_weight(run.chunks):
        place = "the checkpoint" if run.step else f"model.hf_path={run.config.model.hf_path}"
        raise RunEnded(Cause.NOT_FINITE, f"{place}: weight {name} holds a value that is not finite")


def _save_unless_saved(run: Run) -> None:
    latest = find_latest(run.dir / "checkpoints")
    if latest is None or step_of(latest) != run.step:
        save_checkpoint(run)


def _evaluation_is_due(run: Run) -> bool:
    cfg = run.config
    is_due = run.step == cfg.run.steps or (cfg.eval.every > 0 and run.step % cfg.eval.every == 0)
    return is_due and bool(cfg.eval.prompts)


def _write(run: Run, metrics: Mapping[str, float], step: int | None = None) -> None:
    if run.writer and metrics:
        run.writer.write(run.step if step is None else step, metrics)


def _total_tally(run: Run) -> Tally:
    """The step's counts over all leaders, on the leaders; the rank's own counters start again at zero."""
    mine, run.tally = run.tally, Tally()
    if run.leader is None:
        return mine
    total = Tally()
    for tally in gather_objects(mine, run.leader.group):
        total.merge(tally)
    return total
