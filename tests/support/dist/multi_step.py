"""Ranks that make several updates from each rollout batch, without servers: rollouts are put into the queues."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.objective import ObjectiveConfig, ReferenceConfig, ScoreConfig
from megatron_dypo.config.tree import BatchingConfig, CheckpointConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from tests.support.objective_cases import random_groups

PROMPTS = 4
"""Of one update; a rollout batch has two mini-batches."""
MODES = ("exact", "stale")


class Recorder:
    """Stands for the bridge and for the writer: keeps what it is told."""

    serving = ("server",)
    bytes = fenced = rejoined = retries = 0
    pause_seconds = seconds = 0.0

    def __init__(self) -> None:
        self.pushed: list[int] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def refit(self, version: int) -> Recorder:
        self.pushed.append(version)
        return self

    def release(self) -> None:
        """The servers keep their memory."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics[step] = dict(metrics)


class NoRows:
    """Stands for the prompts, which come from nowhere here."""

    def __len__(self) -> int:
        return 0

    def id_of(self, position: int) -> str:
        return f"p{position}"

    def fingerprint(self) -> list[dict[str, Any]]:
        return []


def config_of(
    path: str, folder: str, axes: dict[str, int], mode: Any, score: ScoreConfig | None = None, epochs: int = 1
) -> Config:
    return Config(
        run=RunConfig(dir=folder, steps=5),
        model=ModelConfig(hf_path=path, dtype="float32"),
        parallel=ParallelConfig(**axes),
        data=DataConfig(prompts=("none",)),
        score=score or ScoreConfig(),
        objective=ObjectiveConfig(gal_coefficients=mode, beta_gal=2.0, kl_coef=0.1),
        batching=BatchingConfig(
            prompts_per_update=PROMPTS, updates_per_batch=2, epochs_per_batch=epochs, tokens_per_microbatch=64
        ),
        optimizer=OptimizerConfig(lr=4e-3, clip_grad=0.0),
        checkpoint=CheckpointConfig(every=0),
    )


def batch_of(index: int) -> list[list[Any]]:
    """The groups of one rollout batch as they come from the servers, made by the weights after two updates each."""
    groups = random_groups(11 + index, num_hard=2, num_mid=6, group_size=4, vocab=131)
    fresh: dict[str, Any] = {"policy_version": 2 * index, "old_logp": None, "ref_logp": None}
    return [[dataclasses.replace(s, order=s.order + 8 * index, **fresh) for s in group] for group in groups]


def rank_train(path: str, root: str, axes: dict[str, int]) -> dict[str, Any]:
    from megatron_dypo.parallel.layout import close, init_layout

    layout = init_layout(ParallelConfig(**axes))
    seen = {mode: _train(config_of(path, f"{root}/{mode}", axes, mode), layout) for mode in MODES}
    servers = ScoreConfig(policy="rollout", check_every=2)
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
    """Four updates from as many rollout batches as they take, each put into the queues when the one before is used up."""
    from megatron_dypo.loop.train import train_step

    run, recorder = _run(config, layout)
    steps, given = [], []
    for step in range(4):
        if not run.is_mid_batch:
            given += _put(run, [[_aged(s, age) for s in group] for group in batch_of(step // 2)])
        before = _tensors(run, lambda p: p.detach())
        train_step(run)
        steps.append({"weights": before, "grads": _tensors(run, lambda p: p.main_grad)})
    return {"steps": steps, "groups": given, "pushed": recorder.pushed, "metrics": recorder.metrics}


def _aged(sample: Any, age: int) -> Any:
    """The sample as weights of ``age`` versions before would have made it."""
    return dataclasses.replace(sample, policy_version=max(0, sample.policy_version - age))


def _resume(config: Config, layout: Any) -> Any:
    """Weights after two updates of a batch: without a stop, and with one between them."""
    from megatron_dypo.loop import run as run_module
    from megatron_dypo.mcore.checkpoints.checkpoint import find_latest
    from megatron_dypo.loop.train import train_step

    run, _ = _run(config, layout)
    _put(run, batch_of(0))
    train_step(run)
    run_module.save_checkpoint(run)
    train_step(run)
    again, recorder = _run(config, layout)
    latest = find_latest(again.dir / "checkpoints")
    assert latest is not None
    restored = run_module._restore(again, latest)
    if again.leader:
        run_module._share_queues(again.leader.queues, restored.leader_states, layout)
    train_step(again)
    return [_tensors(r, lambda p: p.detach()) for r in (run, again)], recorder.pushed


def _run(config: Config, layout: Any) -> tuple[Any, Recorder]:
    from megatron_dypo.objective.recipes.registry import build_objective
    from megatron_dypo.loop.run import Leader, _build_policy
    from megatron_dypo.metrics.samples import SampleLog

    run, recorder = _build_policy(config, layout, build_objective(config.objective)), Recorder()
    run.bridge = recorder  # type: ignore[assignment]
    if layout.leaders_group is not None:
        log = SampleLog(run.dir, shard=layout.dp_rank)
        unused: Any = None
        rows: Any = NoRows()
        run.leader = Leader(
            group=layout.leaders_group, tokenizer=unused, stream=rows, held_out={}, client=None, verifier=None, sample_log=log
        )  # fmt: skip
    run.writer = recorder if layout.is_global_leader else None  # type: ignore[assignment]
    return run, recorder


def _put(run: Any, groups: list[list[Any]]) -> list[list[Any]]:
    mine = [g for g in groups if run.leader and g[0].order % run.layout.data == run.layout.dp_rank]
    for group in mine:
        run.leader.queues.put(group)
        run.leader.ledger.draw(1)
    return mine


def _tensors(run: Any, value: Any) -> dict[str, np.ndarray]:
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.models.gather import iter_hf_tensors

    layout = run.layout
    pairs = [(name, value(p)) for name, p in named_global_parameters(run.chunks)]
    tensors = iter_hf_tensors(pairs, run.arch, layout)
    return {name: tensor.numpy().copy() for name, tensor in tensors if layout.dp_rank == 0}
