"""How a run is built. Each part is built after the parts it needs, and closed in reverse order."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_dypo.config.reading.load import dump_config
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.books.recorder import NoWriter, Writer
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.profiler import Profiler
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import MeshRanks
from megatron_dypo.loop.replica import Follower, Replica
from megatron_dypo.loop.resume import require_known_state, restore_batch
from megatron_dypo.loop.servers import NoServers
from megatron_dypo.loop.setup.build_policy import build_policy
from megatron_dypo.loop.setup.connect import await_servers, connect, start_in_background
from megatron_dypo.loop.setup.foundation import Foundation
from megatron_dypo.loop.setup.open_leader import OpenedLeader, open_leader
from megatron_dypo.loop.setup.open_teacher import open_teacher
from megatron_dypo.loop.setup.reference_files import hash_reference
from megatron_dypo.loop.setup.run_folder import prepare_folder, require_whole, write_start
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.teacher import require_logprob_sources
from megatron_dypo.mcore import features
from megatron_dypo.mcore.checkpoints.folder import step_of
from megatron_dypo.mcore.checkpoints.verify import all_ranks
from megatron_dypo.mcore.options.check import require_options
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.metrics.samples import discard_samples
from megatron_dypo.metrics.writer import MetricsWriter, Timings
from megatron_dypo.models.bridged import architecture_of
from megatron_dypo.objective.auto_alpha import GradientMoments
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.parallel.device import compute_capability, device_name, memory_bytes
from megatron_dypo.parallel.groups import MeshRank, close
from megatron_dypo.parallel.position import Position
from megatron_dypo.planning.announcement import announce_plan
from megatron_dypo.planning.fit import check_memory
from megatron_dypo.processes.watchdog import mark

log = logging.getLogger("megatron_dypo")


def uses_servers(config: Config, objective: Objective, first_step: int) -> bool:
    """Return whether any remaining step, evaluation or probe asks a server."""
    steps_left = range(first_step, config.run.steps)
    measures = bool(config.eval.sets) or config.probe.every > 0
    return bool(steps_left) and (measures or any(map(objective.needs_rollouts, steps_left)))


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Build a run: mesh, servers, model, optimizer, last checkpoint, data, refit. Collective over the world.

    Raises:
        ValueError: the run folder holds a checkpoint and ``run.resume`` is false; the policy does not fit into the
            GPUs (``run.check_memory``); the machine cannot run ``model.fp8.recipe``; or any input breaks a rule.
    """
    with contextlib.ExitStack() as stack:
        objective = build_objective(config.objective)
        layout = _join(config, objective, stack)
        mark("verifying the checkpoint")
        latest = prepare_folder(config, all_ranks())
        require_logprob_sources(config, objective)
        with_servers = uses_servers(config, objective, step_of(latest) if latest else 0)
        starting = None
        if with_servers and layout.is_global_leader:
            starting = start_in_background(config, stack, have_worked=latest is not None)
        base = _lay(config, layout, objective, latest, stack, with_servers=with_servers)
        if base.policy.keeps_reference and config.objective.reference.mode == "frozen" and not config.run.smoke:
            mark("hashing the reference")
            base = replace(base, reference_files=hash_reference(config.model))
        opened, replica = _open_replica(base)
        servers = connect(base, opened, await_servers(starting)) if with_servers else NoServers()
        teacher = open_teacher(base, opened)
        if base.restored is not None and latest is not None:
            base.progress.batch = restore_batch(base.restored, replica, latest)
        # Only now: a resume that is refused must leave the run's files as they are.
        writer: Writer = _begin_records(base) if layout.is_global_leader else NoWriter()
        run = Run(
            config=config,
            ranks=base.ranks,
            policy=base.policy,
            objective=objective,
            replica=replica,
            servers=servers,
            writer=writer,
            progress=base.progress,
            timings=base.timings,
            tally=base.tally,
            teacher=teacher,
        )
        base.timings.around = _profiler(base).around
        yield run


@contextlib.contextmanager
def open_probe(config: Config, checkpoint: Path | None) -> Iterator[Run]:
    """Build a run that only measures the weights of a checkpoint; None: the initial weights. Collective over the world.

    Its draws begin at the first prompt, and it writes no metrics.
    """
    with contextlib.ExitStack() as stack:
        objective = build_objective(config.objective)
        layout = _join(config, objective, stack)
        require_whole(checkpoint, config)
        starting = start_in_background(config, stack) if layout.is_global_leader else None
        base = replace(_lay(config, layout, objective, checkpoint, stack, with_servers=True), restored=None)
        opened, replica = _open_replica(base)
        yield Run(
            config=config,
            ranks=base.ranks,
            policy=base.policy,
            objective=objective,
            replica=replica,
            servers=connect(base, opened, await_servers(starting), keeps_journal=False),
            writer=NoWriter(),
            progress=base.progress,
            timings=base.timings,
            tally=base.tally,
        )


def _profiler(base: Foundation) -> Profiler:
    """Return the profiler of the parts of this rank's steps, which does nothing unless the config asks for it."""
    return Profiler(
        cfg=base.config.profile,
        rank=base.policy.layout.rank,
        run_dir=base.run_dir,
        step=lambda: base.progress.step + 1,
        note=base.timings.note,
    )


def _open_replica(base: Foundation) -> tuple[OpenedLeader | Follower, Replica]:
    """Open the data of this rank's replica, if it leads one; return what was opened, and the replica."""
    mark("opening the data")
    leaders = base.policy.layout.leaders_group
    if leaders is None:
        follower = Follower()
        return follower, follower
    opened = open_leader(base, leaders)
    return opened, opened.leader


def _lay(
    config: Config,
    layout: MeshRank,
    objective: Objective,
    latest: Path | None,
    stack: contextlib.ExitStack,
    *,
    with_servers: bool,
) -> Foundation:
    """Build the policy, and restore it from the checkpoint ``latest``."""
    timings, progress, restored = Timings(), Progress(), None
    mark("building the model")
    policy = build_policy(config, layout, objective, timings=timings)
    if latest is not None:
        mark("loading the checkpoint")
        restored = policy.load(latest)
        require_known_state(latest, restored.trainer_state)
        found = restored.trainer_state.get("moments") if config.objective.alpha == "auto" else None
        moments = GradientMoments.from_json(found)
        progress = Progress(step=restored.step, batches=int(restored.trainer_state["batches"]), moments=moments)
        if layout.is_global_leader:
            log.info("resuming from %s: %d of %d steps are done", latest, restored.step, config.run.steps)
    return Foundation(
        config=config,
        ranks=MeshRanks(layout=layout),
        objective=objective,
        policy=policy,
        progress=progress,
        restored=restored,
        with_servers=with_servers,
        timings=timings,
        tally=Tally(),
        stack=stack,
    )


def _join(config: Config, objective: Objective, stack: contextlib.ExitStack) -> MeshRank:
    """Join the other ranks, and check what can be checked before a model is built."""
    # A rank may wait in a collective for as long as the rollouts take; a dead peer is noticed by its socket.
    teacher = config.teacher_servers
    asked_s = config.rollout.request_deadline_s * objective.parts_in_turn()
    deadline_s = asked_s + (teacher.request_deadline_s if teacher.urls else 0.0)
    patience = 2 * deadline_s * config.batching.max_collect_rounds
    layout = start_megatron(config.parallel, timeout_s=max(patience, 1800.0), seed=config.run.seed)
    stack.callback(close, layout)
    found = features.probe()
    features.require_fp8(config.model.fp8, found)
    require_options(config, architecture_of(config.model), found)
    if config.run.check_memory:
        _check_memory(config, memory_bytes(), compute_capability(), layout, fused=found.transformer_engine)
    if layout.is_global_leader:
        log.info("%s", found)
    return layout


def _check_memory(
    config: Config, memory: int | None, capability: tuple[int, int] | None, ranks: Position, *, fused: bool
) -> None:
    """Refuse a run that cannot fit into its GPUs (``run.check_memory``); a CPU has neither memory nor capability."""
    if memory is None or capability is None:
        return
    if config.model.family == "bridge":
        if ranks.is_global_leader:
            log.warning(
                "run.check_memory=true: nothing is checked with model.family=bridge: memory is planned by a name table"
            )
        return
    check_memory(config, trainer_gpus=ranks.mesh.world_size, memory=memory, capability=capability, fused=fused)


def _begin_records(base: Foundation) -> Writer:
    """Write what the run folder says about this start, and remove the records of steps that are made again."""
    config, world_size = base.config, base.ranks.world_size
    first_step = base.progress.step + (base.restored is not None)
    # First, as it raises without having changed anything if W&B is asked for and not installed.
    writer = base.stack.enter_context(
        MetricsWriter(
            base.run_dir,
            config.logging,
            resume_step=first_step,
            config=yaml.safe_load(dump_config(config)),
            declared=base.objective.metrics,
        )
    )
    write_start(config)
    if base.restored is not None:
        discard_samples(base.run_dir, first_step)
    announce_plan(
        config,
        device=device_name(),
        trainer_gpus=world_size,
        gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )
    return writer
