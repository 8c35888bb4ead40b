"""Save and restore the state, besides weights, optimizer and RNG, that a run needs to continue where it stopped."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from safetensors import SafetensorError

from megatron_dypo.batching.queues import Group, order_of
from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.batching.wire import dump_samples, load_samples
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.loop.bad_steps.roll_back import require_weights
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.draws import Draws
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Follower, Replica
from megatron_dypo.loop.requests import Stream
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.loop.updater import Updater
from megatron_dypo.mcore.checkpoints import folder
from megatron_dypo.mcore.checkpoints.prune import SCORES, scores_for
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.processes.watchdog import mark

_STATE_KEYS = {"cursor", "unfinished", "ledger", "batches", "batch", "inputs"}
"""Keys of the trainer's state in a checkpoint that resuming reads (:func:`save_checkpoint` writes them)."""


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """The parts of a run that a checkpoint is written from."""

    folder: Path
    """The folder of all checkpoints."""
    policy: Policy
    replica: Replica
    servers: Servers | NoServers
    updater: Updater
    """Goes back to an earlier checkpoint."""
    ranks: Ranks
    cfg: CheckpointConfig
    total_steps: int
    timings: Timings


def save_if_due(checkpointer: Checkpointer, progress: Progress, metrics: Mapping[str, float]) -> None:
    """Save a checkpoint if the config asks for it, unless the last update was skipped. Collective over the world.

    Before that, publish the one that has been written since. The time it takes is in the metrics of the next step.

    Args:
        metrics: of the step, for ``checkpoint.keep_best``.

    Raises:
        RunEnded: on all ranks: a weight is not finite, and the run does not go back. Nothing is written.
    """
    if checkpointer.cfg.async_save:
        with checkpointer.timings.measure("save_checkpoint"):
            checkpointer.policy.finish_save(waits=False)
    every, is_last = checkpointer.cfg.every, progress.step == checkpointer.total_steps
    is_due = is_last or (every > 0 and progress.step % every == 0)
    if is_due and progress.bad_steps == 0:
        if _went_back(checkpointer, progress):
            metrics = {}  # they describe the weights that are gone
            mark("refitting the servers")
            checkpointer.servers.refit(progress.step)
        mark("saving a checkpoint")
        with checkpointer.timings.measure("save_checkpoint"):
            waits = is_last or not checkpointer.cfg.async_save
            save_checkpoint(checkpointer, progress, metrics, waits=waits)


def save_unless_saved(checkpointer: Checkpointer, progress: Progress) -> None:
    """Save a checkpoint of this step, if there is none. Collective over the world.

    Raises:
        RunEnded: on all ranks: a weight is not finite, and the run does not go back. Nothing is written.
    """
    checkpointer.policy.finish_save(waits=True)
    # All ranks must agree: on a shared file system some may see a new folder later.
    latest = checkpointer.ranks.of_leaders(folder.find_latest(checkpointer.folder))[0]
    if latest is None or folder.step_of(latest) != progress.step:
        _went_back(checkpointer, progress)
        save_checkpoint(checkpointer, progress)


def _went_back(checkpointer: Checkpointer, progress: Progress) -> bool:
    """Look at the weights before a save: some updates are followed by no refit, which looks at them too.

    Return whether the run went back to weights that are finite. Raises RunEnded if they are not.
    """
    return require_weights(checkpointer.updater, progress, f"step {progress.step}, before its checkpoint")


def save_checkpoint(
    checkpointer: Checkpointer,
    progress: Progress,
    metrics: Mapping[str, float] = MappingProxyType({}),
    *,
    waits: bool = True,
) -> Path:
    """Write everything that resuming needs; return the checkpoint's folder. Collective over the world.

    Args:
        waits: the folder is there when this returns; see :meth:`megatron_dypo.loop.policy.Policy.save`.
    """
    replica, batch = checkpointer.replica, progress.batch
    groups = (*batch.groups, *replica.queues.groups(), *batch.buffered, *replica.queues.buffer)
    kept = [sample for group in groups for sample in group]
    drawn = drawn_state(replica, checkpointer.servers.stream, checkpointer.ranks)
    return checkpointer.policy.save(
        checkpointer.folder,
        progress.step,
        trainer_state={
            **drawn,
            "batches": progress.batches,
            "batch": batch.as_json(),
            "moments": progress.moments and progress.moments.as_json(),
            "inputs": replica.inputs,
            SCORES: scores_for(metrics, checkpointer.cfg, progress.step),
            "weights": checkpointer.servers.weights.as_json(),
        },
        leader_state=dump_samples(kept),
        stop_ids=replica.stop_ids,
        cfg=checkpointer.cfg,
        waits=waits,
        on_publish=functools.partial(
            checkpointer.servers.journal.begin_anew, progress.step, drawn["unfinished"], drawn["cursor"]
        ),
    )


class RestoredState(Protocol):
    """The loop's part of a :class:`megatron_dypo.mcore.checkpoints.checkpoint.Restored`."""

    @property
    def trainer_state(self) -> dict[str, Any]: ...

    @property
    def leader_states(self) -> list[bytes]: ...


def drawn_state(replica: Replica, stream: Stream, ranks: Ranks) -> dict[str, Any]:
    """Return the position of the run's next draw, and the unfinished draws before it. Collective over the world."""
    if isinstance(replica, Follower):
        by_replica = ranks.of_leaders((0, list[int](), Ledger()))
    else:
        with stream.still():
            unfinished = [prompt.order for prompt in replica.unfinished()] + stream.unfinished()
            mine = replica.draws.cursor, unfinished, replica.draws.ledger_with_left_out()
        by_replica = ranks.of_leaders(mine)
    end = max(cursor for cursor, _, _ in by_replica)
    ledger, orders = Ledger(), list[int]()
    for number, (cursor, unfinished, own) in enumerate(by_replica):
        # A replica may be behind the others. The draws it has not made yet are in flight for the run that resumes.
        behind = range(cursor + (number - cursor) % ranks.replicas, end, ranks.replicas)
        ledger += own
        ledger.draw(len(behind))
        orders += [*unfinished, *behind]
    return {"cursor": end, "unfinished": sorted(orders), "ledger": ledger.as_json()}


def restore_draws(draws: Draws, state: Mapping[str, Any]) -> None:
    """Continue the draws of a checkpoint. The first replica gets the ledger of all draws before it."""
    draws.resume(int(state["cursor"]), state["unfinished"])
    if draws.replica == 0:
        draws.ledger = Ledger.from_json(state["ledger"])


def restore_batch(stored: RestoredState, replica: Replica, path: Path) -> RolloutBatch:
    """Put waiting groups into the queues of this replica, and return the rest of the open rollout batch.

    A group goes to the replica that has its draw (:class:`Draws`), however many replicas wrote the checkpoint. With as
    many replicas as before each goes on with its own groups, so the sums of an update have the same order.

    Args:
        path: of the checkpoint, for messages.

    Raises:
        ValueError: a ``leader_*.bin`` is damaged, or lacks a group that the batch needs.
    """
    state = stored.trainer_state["batch"]
    if isinstance(replica, Follower):
        return RolloutBatch.from_json(state)
    try:
        found = load_groups(stored.leader_states)
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: a file leader_*.bin is damaged: {error}") from error
    groups = [group for group in found if not group[0].is_buffered]
    buffered = [group for group in found if group[0].is_buffered]
    draws = replica.draws
    own, own_buffered = (
        [group for group in kept if order_of(group) % draws.replicas == draws.replica] for kept in (groups, buffered)
    )
    batch = RolloutBatch.from_json(state, own, own_buffered)
    missing = set(batch.open_orders()) - {order_of(group) for group in groups}
    missing |= set(batch.buffered_orders) - {order_of(group) for group in buffered}
    if missing:
        raise ValueError(f"{path}: the files leader_*.bin lack draws {sorted(missing)} of the rollout batch")
    for waiting, orders in ((own, set(batch.orders)), (own_buffered, set(batch.buffered_orders))):
        for group in waiting:
            if order_of(group) not in orders:
                replica.queues.put(group)
    return batch


def load_groups(leader_states: Sequence[bytes]) -> list[Group]:
    """Return all groups of a checkpoint, oldest first, each with its members in their order.

    A trace in the buffer is a group of its own, beside the group of the same draw.
    """
    samples = sorted((s for state in leader_states for s in load_samples(state)), key=lambda s: (s.order, s.member))
    groups: dict[tuple[int, bool], Group] = {}
    for sample in samples:
        groups.setdefault((sample.order, sample.is_buffered), []).append(sample)
    return list(groups.values())


def require_known_state(checkpoint_path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError if another version wrote a checkpoint's ``trainer_state.json`` and keys are missing."""
    absent = sorted(_STATE_KEYS - state.keys())
    if absent:
        raise ValueError(
            f"{checkpoint_path}/{folder.STATE}: trainer: has no {', '.join(absent)}: another version of "
            "megatron-dypo wrote it, and this one cannot go on from it. `megatron-dypo export` still writes its "
            "weights as an HF folder: start from that by model.hf_path, in another run.dir"
        )
