"""Run one rank for the rivals of DYPO: the gradient of each rival, under each layout of a world size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.dist.layout_gradients import packed_microbatches, stage_gradients


def rank_gradients(
    layouts: Mapping[str, Any], ports: Sequence[int], path: str, updates: Mapping[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return {(layout, objective): this rank's HF-named gradients}; ``updates``: name → (config, weighted samples).

    On the leader, "entropies" has the entropies of each update's response tokens, from the pass for π_old.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (name, axes), port in zip(layouts.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        found |= {(name, objective): grads for objective, grads in _layout(axes, path, updates).items()}
    return found


def _layout(axes: Mapping[str, Any], path: str, updates: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    from megatron_dypo.batching.zigzag import shard
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.config.training import OptimizerConfig
    from megatron_dypo.mcore.forward_step import loss_pass
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.optimizer import build_optimizer
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.objective.recipes.registry import build_objective
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout, distributed_optimizer=False, overlap_grad_reduce=False)
    load_initial_weights(chunks, model, arch, layout)
    optimizer = build_optimizer(chunks, OptimizerConfig(distributed=False), dtype="float32", total_steps=1)
    found: dict[str, Any] = {"entropies": {}}
    for name, (cfg, samples) in updates.items():
        if build_objective(cfg).needs_old_entropy():
            found["entropies"][name] = sequence_logprobs(chunks, samples, layout=layout, budget=48, entropy=True)
        optimizer.zero_grad()
        parts = [shard(m, layout.cp_rank, layout.context) for m in packed_microbatches(samples, 2, layout)]
        loss_pass(chunks, parts, objective=build_objective(cfg), context_group=layout.cp_group)
        found[name] = stage_gradients(chunks, arch, layout, False)
    close(layout)
    return found
