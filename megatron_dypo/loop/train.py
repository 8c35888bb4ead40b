"""The loop: collect, open a rollout batch, compute log-probs, make its updates, refit.

Data flows through the return values: waiting groups → :class:`RolloutBatch` → :class:`Minibatch` → samples with token
weights → :class:`UpdateReport`. A checkpoint stores the waiting groups and the rest of the rollout batch.
"""

from __future__ import annotations

import logging

from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.accounts import enter_minibatch
from megatron_dypo.loop.books.tally import rollout_metrics, step_metrics, tally_work
from megatron_dypo.loop.collect import collect_in_rounds
from megatron_dypo.loop.collect_from_stream import collect_from_stream
from megatron_dypo.loop.evaluate import evaluate
from megatron_dypo.loop.not_finite import count_update, require_finite_weights
from megatron_dypo.loop.resume import save_checkpoint, save_unless_saved
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.update import count_totals, open_batch, token_weights
from megatron_dypo.metrics.writer import summary_line
from megatron_dypo.processes.stop_requests import is_requested
from megatron_dypo.processes.watchdog import mark

log = logging.getLogger("megatron_dypo")


def train(config: Config) -> None:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run.

    Raises:
        RunEnded: on all ranks: the run ended before that, for its cause. What was done is in a checkpoint, unless the
            weights are not finite. A model is exported only if the run was trained until nothing was left to learn.
    """
    from megatron_dypo.loop.setup.build import open_run  # here, since it imports Megatron, which the loop does not need

    with open_run(config) as run:
        train_run(run)


def train_run(run: Run) -> None:
    """Make the steps of a run that is built, save and export; raise RunEnded as :func:`train`."""
    try:
        make_steps(run)
    except RunEnded as end:
        end_early(run, end)
        raise
    finish(run)


def make_steps(run: Run) -> None:
    """Make the steps that are left.

    Raises:
        RunEnded: on all ranks: the run ends before its last step, or its last updates were skipped.
    """
    progress, steps = run.progress, run.config.run.steps
    mark("checking weights")
    place = "the checkpoint" if progress.step else f"model.hf_path={run.config.model.hf_path}"
    require_finite_weights(run.policy, place)
    run.accounts.report(progress.step, steps, run.batch)
    run.servers.refit(progress.step)
    if progress.step == 0 and (metrics := evaluate(run.evaluator, 0)):
        run.writer.write(0, metrics)
    run.timings.take()
    while progress.step < steps:
        if run.ranks.any_rank(is_requested()):
            raise RunEnded(Cause.STOPPED, f"stopped on request; what was done is in {run.checkpoints}")
        train_step(run)
    if progress.bad_steps:
        raise RunEnded(
            Cause.NOT_FINITE,
            f"the last {progress.bad_steps} updates of the run were skipped: {progress.last_problem}",
        )


def train_step(run: Run) -> None:
    """Make one optimizer step, write its metrics, and do what is due after it.

    The first step of a rollout batch collects it; the servers get the weights after its last, or for an evaluation.

    Raises:
        RunEnded: on all ranks: nothing can be learned from what was collected, or updates are not finite.
    """
    config, progress = run.config, run.progress
    with run.timings.measure("step"):
        if run.batch.is_used_up:
            mark("collecting rollouts")
            collector = run.collector
            collect = collect_from_stream if collector.uses_stream(progress.step) else collect_in_rounds
            queues = collect(collector, progress.step)
            run.servers.offload_servers()
            mark("computing log-probs")
            run.batch = open_batch(
                queues, run.logprobs, run.ranks, config.batching, version=progress.step, number=progress.batches
            )
            progress.batches += 1
        minibatch, run.batch = run.batch.next_minibatch(config.batching.prompts_per_update)
        mark("updating")
        enter_minibatch(run.replica, minibatch, run.tally)
        totals = count_totals(minibatch.groups, run.ranks)
        groups = run.logprobs.with_current(minibatch.groups, progress.step)
        weighted = token_weights(groups, totals, run.objective, config, step=progress.step, tally=run.tally)
        report = run.policy.update(weighted)
        tally_work(run.tally, report.flops)
        metrics = dict(report.metrics)
        end = count_update(progress, report, run.policy, run.replica, run.ranks, config.optimizer.max_bad_steps)
        if end is None and (minibatch.is_last or run.evaluator.is_due(progress.step, config.run.steps)):
            mark("refitting the servers")
            metrics |= run.servers.refit(progress.step)
    metrics |= step_metrics(
        run.accounts.take_tally(), run.timings.take(), totals, report.sums, run.objective.metrics, run.ranks.world_size
    )
    metrics |= run.accounts.report(progress.step, config.run.steps, run.batch).metrics()
    if end is not None:
        run.writer.write(progress.step, metrics)
        raise end
    after_step(run, metrics)


def after_step(run: Run, metrics: dict[str, float]) -> None:
    """Refresh the reference and evaluate where the config says so, write the step's metrics, save.

    The time of a checkpoint stands in the metrics of the step after it.
    """
    config, step = run.config, run.progress.step
    is_last = step == config.run.steps
    if run.policy.keeps_reference and config.objective.reference.is_refreshed_after(step):
        run.policy.refresh_reference()
    if run.ranks.is_global_leader and (is_last or step % config.logging.summary_every == 0):
        log.info(summary_line(step, metrics))
    if run.evaluator.is_due(step, config.run.steps):
        mark("evaluating")
        metrics |= evaluate(run.evaluator, step)
    # Before the checkpoint: a run that resumes from it finds the step's metrics written.
    run.writer.write(step, metrics | run.timings.take())
    is_due = is_last or (config.checkpoint.every > 0 and step % config.checkpoint.every == 0)
    if is_due and run.progress.bad_steps == 0:
        mark("saving a checkpoint")
        with run.timings.measure("save_checkpoint"):
            save_checkpoint(run)


def finish(run: Run) -> None:
    """Save the policy, if that is not done yet, and export it."""
    mark("saving and exporting")
    save_unless_saved(run)
    if run.config.export.hf:
        run.policy.export(run.dir / "hf")
    run.accounts.log(run.progress.step, run.config.run.steps, run.batch)


def end_early(run: Run, end: RunEnded) -> None:
    """Keep what a run did that ends before its last step. Collective over the world."""
    # What a collection counted from which no update was made is the record of the step that it was for.
    timings, tally = run.timings.take(), run.accounts.take_tally()
    found = run.accounts.report(run.progress.step, run.config.run.steps, run.batch)
    if tally["asked"] or tally["dropped_prompts"]:
        run.writer.write(run.progress.step + 1, rollout_metrics(tally) | timings | found.metrics())
    if end.cause is Cause.NOTHING_LEFT and run.progress.step > 0:
        finish(run)
        return
    if run.progress.step > 0 and end.cause is not Cause.NOT_FINITE:
        save_unless_saved(run)
    run.accounts.log(run.progress.step, run.config.run.steps, run.batch)
