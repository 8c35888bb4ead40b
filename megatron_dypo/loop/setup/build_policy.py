"""How the policy of a run is built, with its initial weights."""

from __future__ import annotations

from megatron_dypo.config.tree import Config
from megatron_dypo.loop.megatron_policy import MegatronPolicy
from megatron_dypo.mcore.model import build_model, draw_initial_weights, load_initial_weights
from megatron_dypo.mcore.optimizer import build_optimizer
from megatron_dypo.mcore.reference import ReferencePolicy
from megatron_dypo.mcore.routing_replay import install
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.models.bridged import architecture_of
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.parallel.groups import MeshRank


def build_policy(config: Config, layout: MeshRank, objective: Objective, *, timings: Timings) -> MegatronPolicy:
    """Build the model with its initial weights, the optimizer and, if the objective reads one, the reference.

    Collective over the world.
    """
    arch = architecture_of(config.model)
    chunks = build_model(
        arch,
        config.model,
        config.parallel,
        layout,
        distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
    )
    if config.run.smoke:
        draw_initial_weights(chunks, arch, layout, seed=config.run.seed)
    else:
        load_initial_weights(chunks, config.model, arch, layout)
    optimizer = build_optimizer(
        chunks, config.optimizer, dtype=config.model.dtype, total_steps=config.run.steps, fp8=config.model.fp8
    )
    keeps_reference = objective.needs_reference() and config.objective.reference.keeps_weights()
    rewrite = optimizer.rewrite_weights if config.model.fp8.param_gather else None
    return MegatronPolicy(
        config=config,
        layout=layout,
        arch=arch,
        chunks=chunks,
        optimizer=optimizer,
        objective=objective,
        reference=ReferencePolicy(chunks, rewrite=rewrite) if keeps_reference else None,
        timings=timings,
        replay=None if config.objective.replay == "off" else install(chunks, arch, layout),
    )
