"""The way back from updates that are not finite: weights and optimizer of the last checkpoint. Called by all ranks."""

from __future__ import annotations

import logging

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.bad_steps.not_finite import end_by_weights, require_finite_weights
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.updater import Updater
from megatron_dypo.mcore.checkpoints.choose import newest_whole
from megatron_dypo.mcore.checkpoints.folder import candidates, step_of
from megatron_dypo.mcore.checkpoints.verify import all_ranks
from megatron_dypo.processes.watchdog import mark

log = logging.getLogger("megatron_dypo")


def require_weights(updater: Updater, progress: Progress, place: str) -> bool:
    """Require that every weight is finite, or go back as :func:`roll_back_after`; return whether the run went back.

    ``place`` says where the weights were looked at.

    Raises:
        RunEnded: on all ranks: a weight is not finite, and the run does not go back.
    """
    went_back, end = roll_back_after(end_by_weights(updater.policy, place), updater, progress)
    if end is not None:
        raise end
    return went_back


def roll_back_after(end: RunEnded | None, updater: Updater, progress: Progress) -> tuple[bool, RunEnded | None]:
    """Go back to the last whole checkpoint if there is an ``end`` and ``optimizer.on_bad_step`` asks for it.

    Weights, optimizer, RNG states and a refreshed reference are those of the checkpoint again. Data, books and the
    number of the step go on: no prompt is drawn again, and the samples behind the bad updates do not come back.
    A damaged checkpoint is set aside, as at a resume. The caller refits the servers.

    Args:
        end: of the run by values that are not finite, if any.

    Returns:
        Whether the run went back; and the end of the run, None if it goes on.
    """
    if end is None or updater.bad_steps.policy != "roll_back":
        return False, end
    try:
        step = _roll_back(end, updater, progress)
    except RunEnded as no_way_back:
        return False, no_way_back
    updater.tally.extreme("max:rolled_back_to", step)
    return True, None


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
