"""Run ranks that make several updates from each rollout batch, without servers: rollouts are put into the queues."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.objective import ObjectiveConfig, OldLogpConfig, ReferenceConfig
from megatron_dypo.config.run import CheckpointConfig, RunConfig
from megatron_dypo.config.training import BatchingConfig, OptimizerConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.prompts import DropCounts
from tests.support.objective_cases import random_groups

PROMPTS = 4
"""Prompts of one update. A rollout batch has two minibatches."""
MODES = ("exact", "stale")


class Recorder:
    """A refitter and a metrics writer that record their calls."""

    serving = ("server",)
    bytes = fenced = rejoined = retries = 0
    pause_seconds = seconds = 0.0

    def __init__(self) -> None:
        self.refitted: list[int] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.end: Exception | None = None
        """Raised by the next refit."""

    def refit(self, version: int) -> Recorder:
        if self.end is not None:
            raise self.end
        self.refitted.append(version)
        return self

    def release(self) -> None:
        """Do nothing: the servers keep their memory."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics[step] = dict(metrics)


class NoRows:
    """A stand-in for the prompts, which these runs do not draw."""

    def __len__(self) -> int:
        return 0

    def at(self, positions: Any) -> Any:
        return [], DropCounts()

    def id_of(self, position: int) -> str:
        return f"p{position}"


def config_of(
    path: str, folder: str, axes: dict[str, Any], mode: Any, old_logp: OldLogpConfig | None = None, epochs: int = 1
) -> Config:
    return Config(
        run=RunConfig(dir=folder, steps=5),
        model=ModelConfig(hf_path=path, dtype="float32"),
        parallel=ParallelConfig(**axes),
        data=DataConfig(prompts=("none",)),
        old_logp=old_logp or OldLogpConfig(),
        objective=ObjectiveConfig(gal_coefficients=mode, beta_gal=2.0, kl_coef=0.1),
        batching=BatchingConfig(
            prompts_per_update=PROMPTS, updates_per_batch=2, epochs_per_batch=epochs, tokens_per_microbatch=64
        ),
        optimizer=OptimizerConfig(lr=4e-3, clip_grad=0.0),
        checkpoint=CheckpointConfig(every=0),
    )


def batch_of(index: int) -> list[list[Any]]:
    """Return the groups of one rollout batch as servers would give them, sampled after every two updates."""
    groups = random_groups(11 + index, num_hard=2, num_mid=6, group_size=4, vocab=131)
    fresh: dict[str, Any] = {"policy_version": 2 * index, "old_logp": None, "ref_logp": None}
    return [[dataclasses.replace(s, order=s.order + 8 * index, **fresh) for s in group] for group in groups]


def rank_train(path: str, root: str, axes: dict[str, Any]) -> dict[str, Any]:
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig(**axes))
    seen = {mode: _train(config_of(path, f"{root}/{mode}", axes, mode), layout) for mode in MODES}
    servers = OldLogpConfig(source="server", check_every=2)
    seen["rollout"] = _train(config_of(path, f"{root}/rollout", axes, "exact", servers), layout)
    seen["older"] = _train(config_of(path, f"{root}/older", axes, "exact", servers), layout, age=1)
    seen["epochs"] = _train(config_of(path, f"{root}/epochs", axes, "exact", epochs=2), layout)
    refreshed = config_of(path, f"{root}/refreshed", axes, "exact")
    reference = ReferenceConfig(mode="refreshed", refresh_every=2)
    refreshed = dataclasses.replace(refreshed, objective=dataclasses.replace(refreshed.objective, reference=reference))
    seen["refreshed"] = _train(refreshed, layout)
    seen["resumed"] = _resume(config_of(path, f"{root}/resumed", axes, "exact"), layout)
    close(layout)
    return seen


def _train(config: Config, layout: Any, age: int = 0) -> dict[str, Any]:
    """Make four updates; each rollout batch is put into the queues when the one before is used up."""
    from tests.support.loop_cases import make_step

    run, recorder, policy = make_run(config, layout)
    steps = []
    for step in range(4):
        if run.progress.batch.is_used_up:
            put(run, [[_aged(s, age) for s in group] for group in batch_of(step // 2)])
        before = _tensors(policy, lambda p: p.detach())
        make_step(run)
        steps.append({"weights": before, "grads": _tensors(policy, lambda p: p.main_grad)})
    return {"steps": steps, "groups": policy.groups(), "refitted": recorder.refitted, "metrics": recorder.metrics}


def _aged(sample: Any, age: int) -> Any:
    """Return the sample as weights of ``age`` versions earlier would have sampled it."""
    return dataclasses.replace(sample, policy_version=max(0, sample.policy_version - age))


def _resume(config: Config, layout: Any) -> Any:
    """Return the weights after two updates of a batch: without a stop, and with a stop between them."""
    from megatron_dypo.loop.progress import Progress
    from megatron_dypo.loop.resume import restore_batch, save_checkpoint
    from tests.support.loop_cases import make_step

    run, _, policy = make_run(config, layout)
    put(run, batch_of(0))
    make_step(run)
    folder = save_checkpoint(run.checkpointer, run.progress)
    make_step(run)
    again, recorder, resumed = make_run(config, layout)
    restored = resumed.load(folder)
    again.progress = Progress(step=restored.step, batches=restored.trainer_state["batches"])
    again.progress.batch = restore_batch(restored, again.replica, folder)
    make_step(again)
    return [_tensors(p, lambda p: p.detach()) for p in (policy, resumed)], recorder.refitted


class Watched:
    """A policy that keeps the samples of its updates."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._samples: dict[tuple[int, int], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def update(self, weighted: Any) -> Any:
        self._samples |= {(sample.order, sample.member): sample for sample in weighted}
        return self._policy.update(weighted)

    def groups(self) -> list[list[Any]]:
        """Return the groups that this rank's replica gave to updates, oldest first."""
        members = sorted(self._samples)
        return [[self._samples[k] for k in group] for _, group in itertools.groupby(members, key=lambda key: key[0])]


def make_run(config: Config, layout: Any) -> tuple[Any, Recorder, Any]:
    """Make a run without servers and prompts; return it with its recorder and its policy."""
    from megatron_dypo.loop.books.ledger import Ledger
    from megatron_dypo.loop.books.recorder import NoWriter
    from megatron_dypo.loop.books.tally import Tally
    from megatron_dypo.loop.draws import Draws
    from megatron_dypo.loop.ranks import MeshRanks
    from megatron_dypo.loop.replica import Books, Follower, Leader
    from megatron_dypo.loop.requests import FollowerRequests
    from megatron_dypo.loop.servers import NoRouter, Servers
    from megatron_dypo.loop.setup.build_policy import build_policy
    from megatron_dypo.loop.state import Run
    from megatron_dypo.metrics.samples import SampleLog
    from megatron_dypo.metrics.writer import Timings
    from megatron_dypo.objective.recipes.registry import build_objective

    objective, ranks, recorder = build_objective(config.objective), MeshRanks(layout=layout), Recorder()
    told: Any = recorder
    timings, tally = Timings(), Tally()
    built = build_policy(config, layout, objective, timings=timings)
    policy: Any = Watched(built)
    replica: Leader | Follower = Follower()
    if layout.leaders_group is not None:
        ledger, run_dir = Ledger(), Path(config.run.dir)
        unused: Any = None
        replica = Leader(
            draws=Draws(source=NoRows(), ledger=ledger, replica=layout.dp_rank, replicas=layout.data),
            tokenizer=unused,
            held_out={},
            sample_log=SampleLog(run_dir, shard=layout.dp_rank),
            run_dir=run_dir,
            books=Books(ledger=ledger),
        )
    run = Run(
        config=config,
        ranks=ranks,
        policy=policy,
        objective=objective,
        replica=replica,
        servers=Servers(
            refitter=told, requests=FollowerRequests(), router=NoRouter(), ranks=ranks, tally=tally, timings=timings
        ),
        writer=told if layout.is_global_leader else NoWriter(),
        timings=timings,
        tally=tally,
    )
    return run, recorder, policy


def put(run: Any, groups: list[list[Any]]) -> None:
    """Put this replica's part of the servers' groups into its queues and its accounts."""
    from megatron_dypo.loop.replica import Leader

    if not isinstance(run.replica, Leader):
        return
    draws = run.replica.draws
    for group in groups:
        if group[0].order % draws.replicas == draws.replica:
            run.replica.queues.put(group)
            draws.ledger.draw(1)


def _tensors(policy: Any, value: Any) -> dict[str, np.ndarray]:
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.models.gather import iter_hf_tensors

    layout = policy.layout
    pairs = [(name, value(p)) for name, p in named_global_parameters(policy.chunks)]
    tensors = iter_hf_tensors(pairs, policy.arch, layout)
    return {name: tensor.numpy().copy() for name, tensor in tensors if layout.dp_rank == 0}
