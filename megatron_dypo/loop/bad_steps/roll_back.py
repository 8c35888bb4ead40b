"""The way back from updates that are not finite: weights and optimizer of the last checkpoint. Called by all ranks."""

from __future__ import annotations

import logging

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.bad_steps.not_finite import require_finite_weights
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.updater import Update, Updater
from megatron_dypo.mcore.checkpoints.choose import newest_whole
from megatron_dypo.mcore.checkpoints.folder import candidates, step_of
from megatron_dypo.mcore.checkpoints.verify import all_ranks
from megatron_dypo.processes.watchdog import mark

log = logging.getLogger("megatron_dypo")


def roll_back_after(update: Update, updater: Updater, progress: Progress) -> tuple[dict[str, float], RunEnded | None]:
    """Go back to the last whole checkpoint if the update would end the run and ``optimizer.on_bad_step`` asks for it.

    Weights, optimizer, RNG states and a refreshed reference are those of the checkpoint again. Data, books and the
    number of the step go on: no prompt is drawn again, and the samples behind the bad updates do not come back.
    A damaged checkpoint is set aside, as at a resume.

    Returns:
        The metrics of going back, {} if the run did not; and the end of the run, None if it goes on.
    """
    if update.end is None or updater.bad_steps.policy != "roll_back":
        return {}, update.end
    try:
        return {"train/rolled_back_to": float(_roll_back(update.end, updater, progress))}, None
    except RunEnded as end:
        return {}, end


def _roll_back(reason: RunEnded, updater: Updater, progress: Progress) -> int:
    """Go back, and return the step of the checkpoint. Raises RunEnded if that is not possible."""
    policy, ranks, queues, rules = updater.policy, updater.ranks, updater.replica.queues, updater.bad_steps
    if progress.rollbacks == rules.max_rollbacks:
        times = f"{rules.max_rollbacks} times already"
        raise RunEnded(Cause.NOT_FINITE, f"{reason}; this run went back to a checkpoint {times}")
    policy.finish_save(waits=True)
    mark("rolling back")
    # The first rank's look decides: on a shared file system others may see a new folder later.
    existing = ranks.of_leaders(candidates(rules.checkpoints))[0]
    try:
        latest = newest_whole(existing, rules.verify, all_ranks())
    except ValueError as error:
        raise RunEnded(Cause.NOT_FINITE, f"{reason}; {error}") from error
    if latest is None:
        raise RunEnded(Cause.NOT_FINITE, f"{reason}; there is no checkpoint to go back to")
    policy.load(latest)
    require_finite_weights(policy, str(latest))
    # The log-probs of the groups that wait are those of the weights that are gone.
    progress.batch = progress.batch.with_groups(updater.logprobs.again(progress.batch.groups, progress.step))
    queues.replace(updater.logprobs.again(queues.groups(), progress.step))
    progress.rollbacks, progress.bad_steps = progress.rollbacks + 1, 0
    if ranks.is_global_leader:
        log.warning("step %d: weights and optimizer are those of %s again", progress.step, latest)
    return step_of(latest)
