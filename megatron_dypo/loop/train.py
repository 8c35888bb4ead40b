"""The loop: collect, open a rollout batch, compute log-probs, make its updates, refit.

Data flows through the return values: waiting groups → :class:`RolloutBatch` → :class:`Minibatch` → samples with token
weights → :class:`UpdateReport`. A checkpoint stores the waiting groups and the rest of the rollout batch. A step gets
the parts of the run in the order in which they act.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.bad_steps.not_finite import end_by_weights, require_finite_weights
from megatron_dypo.loop.bad_steps.roll_back import roll_back_after
from megatron_dypo.loop.books.recorder import Recorder
from megatron_dypo.loop.collect import Collector, collect_in_rounds
from megatron_dypo.loop.collect_from_stream import collect_from_stream
from megatron_dypo.loop.evaluate import Evaluator, evaluate
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.probe import Prober, probe
from megatron_dypo.loop.profiler import memory_picture
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.resume import Checkpointer, save_if_due, save_unless_saved
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.update import open_batch
from megatron_dypo.loop.updater import Updater, is_refresh_due, update_policy
from megatron_dypo.processes.stop_requests import is_requested
from megatron_dypo.processes.watchdog import begin_step, mark

log = logging.getLogger("megatron_dypo")


def train(config: Config) -> None:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run.

    Raises:
        RunEnded: on all ranks: the run ended earlier. Its state is in a checkpoint, unless the weights are not finite.
            A model is then exported only if nothing was left to learn from.
    """
    from megatron_dypo.loop.setup.build import open_run  # imports Megatron, which the loop does not need

    run_dir, rank = Path(config.run.dir), int(os.environ.get("RANK", "0"))
    with memory_picture(config.profile, rank, run_dir), open_run(config) as run:
        if config.run.smoke:
            from megatron_dypo.loop.smoke import smoke  # which imports this module

            smoke(run)
        else:
            train_run(run)


def train_run(run: Run) -> None:
    """Make the steps of a run that is built, save and export; raise RunEnded as :func:`train`."""
    progress, recorder, checkpointer = run.progress, run.recorder, run.checkpointer
    export_to = run.dir / "hf" if run.config.export.hf else None
    try:
        begin(progress, run.policy, run.evaluator, recorder, run.start_of_weights)
        while progress.step < run.config.run.steps:
            if run.ranks.any_rank(is_requested()):
                raise RunEnded(Cause.STOPPED, f"stopped on request; what was done is in {checkpointer.folder}")
            metrics = train_step(progress, run.collector, run.updater, run.evaluator, run.prober, recorder)
            save_if_due(checkpointer, progress, metrics)
        require_last_update(progress)
    except RunEnded as end:
        recorder.write_unfinished(progress)
        save_and_export(end, progress, checkpointer, export_to)
        recorder.log(progress)
        raise
    save_and_export(None, progress, checkpointer, export_to)
    recorder.log(progress)


def begin(progress: Progress, policy: Policy, evaluator: Evaluator, recorder: Recorder, place: str) -> None:
    """Bring the current weights to the servers, and evaluate them before the first step.

    ``place`` says where the weights come from.

    Raises:
        RunEnded: on all ranks: a weight is not finite.
    """
    mark("checking weights")
    require_finite_weights(policy, place)
    recorder.report(progress)
    mark("refitting the servers")
    evaluator.servers.refit(progress.step)
    if progress.step == 0:
        mark("evaluating")
        if metrics := evaluate(evaluator, 0):
            recorder.writer.write(0, metrics)
    recorder.timings.take()


def train_step(
    progress: Progress,
    collector: Collector,
    updater: Updater,
    evaluator: Evaluator,
    prober: Prober,
    recorder: Recorder,
) -> dict[str, float]:
    """Make one optimizer step, evaluate, probe and refresh the reference if due; write and return the step's metrics.

    The first step of a rollout batch collects the batch. The servers get the weights after its last step, and for an
    evaluation or a probe. Weights that become the servers' or the reference are finite.

    Raises:
        RunEnded: on all ranks: nothing can be learned from the collected groups, or updates or weights are not finite.
    """
    refit: dict[str, float] = {}
    begin_step()
    with recorder.timings.measure("step"):
        if progress.batch.is_used_up:
            collect_batch(progress, collector)
        minibatch, progress.batch = progress.batch.next_minibatch(collector.batching.prompts_per_update)
        mark("updating")
        update = update_policy(updater, minibatch, progress)
        is_evaluated, is_probed = evaluator.is_due(progress.step, recorder.total_steps), prober.is_due(progress.step)
        is_refitted = minibatch.is_last or is_evaluated or is_probed
        is_refreshed = is_refresh_due(updater, progress.step)
        end = update.end
        if end is None and (is_refitted or is_refreshed):
            # The update itself can make such a weight of finite gradients, as from a spoilt moment.
            end = end_by_weights(updater.policy, f"step {progress.step}, after its update")
        went_back, end = roll_back_after(end, updater, progress)
        if end is None and (is_refitted or went_back):
            mark("refitting the servers")
            refit = collector.servers.refit(progress.step)
    metrics = {**update.report.metrics, **refit, **recorder.gather(progress, update)}
    if end is not None:
        recorder.write(progress.step, metrics)
        raise end
    if is_refreshed:
        updater.policy.refresh_reference()
    recorder.summarize(progress.step, metrics)
    if is_evaluated:
        mark("evaluating")
        metrics |= evaluate(evaluator, progress.step)
    if is_probed:
        mark("probing")
        metrics |= probe_weights(updater, prober, progress)
    # Before the checkpoint: a run that resumes from it finds the step's metrics written.
    recorder.write(progress.step, metrics)
    return metrics


def collect_batch(progress: Progress, collector: Collector) -> None:
    """Collect groups, and open the next rollout batch of them.

    Raises:
        RunEnded: on all ranks: nothing can be learned from the collected groups.
    """
    mark("collecting rollouts")
    collect = collect_from_stream if collector.uses_stream(progress.step) else collect_in_rounds
    queues = collect(collector, progress.step)
    collector.servers.offload_servers()
    mark("computing log-probs")
    progress.batch = open_batch(
        queues,
        collector.logprobs,
        collector.ranks,
        collector.batching,
        version=progress.step,
        number=progress.batches,
        buffer=collector.objective.trace_buffer(),
    )
    progress.batches += 1


def probe_weights(updater: Updater, prober: Prober, progress: Progress) -> dict[str, float]:
    """Probe the weights of now, and let α follow if the config asks for it; return the metrics.

    Without enough prompts there is no probe: a measurement does not end a run.
    """
    try:
        report = probe(prober, progress.step)
    except RunEnded as end:
        if end.cause is not Cause.NO_VERDICTS:
            raise
        log.warning("step %d: no probe: %s", progress.step, end)
        return {}
    if prober.objective.alpha != "auto":
        return report.metrics
    if report.moments is not None:
        progress.moments = report.moments.mixed_into(progress.moments, updater.auto_alpha.smoothing)
    if progress.moments is None:
        return report.metrics
    return {**report.metrics, "probe/alpha": progress.moments.alpha(updater.auto_alpha)}


def require_last_update(progress: Progress) -> None:
    """Raise RunEnded if the run's last update was skipped."""
    if progress.bad_steps:
        skipped = f"the last {progress.bad_steps} updates of the run were skipped"
        raise RunEnded(Cause.NOT_FINITE, f"{skipped}: {progress.last_problem}")


def save_and_export(
    end: RunEnded | None, progress: Progress, checkpointer: Checkpointer, export_to: Path | None
) -> None:
    """Save the final policy of a run, unless it is saved already, and export it. Collective over the world.

    A run that made no step before its ``end``, or whose weights are not finite, saves nothing. A run is exported only
    if it made all its steps (``end`` is None) or nothing was left to learn from.
    """
    if end is not None and (progress.step == 0 or end.cause is Cause.NOT_FINITE):
        checkpointer.policy.finish_save(waits=True)
        return
    is_trained = end is None or end.cause is Cause.NOTHING_LEFT
    if is_trained:
        mark("saving and exporting")
    save_unless_saved(checkpointer, progress)
    if is_trained and export_to is not None:
        checkpointer.policy.export(export_to, stop_ids=checkpointer.replica.stop_ids)
