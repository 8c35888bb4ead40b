"""Plan a refit from config files alone, for ``megatron-dypo plan-refit``: the bytes it moves, from where to where."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.config.tree import Config
from megatron_dypo.models.bridged import tabled_architecture
from megatron_dypo.models.layout_rules import check_layout
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.refit.plan.flags import mesh_of_flags
from megatron_dypo.refit.plan.refit_plan import RefitPlan, make_plan


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """Facts that the config does not hold."""

    world_size: int | None = None
    """Ranks of the trainer; None: ``parallel.num_processes``, or the fewest that the axes allow."""
    ep_size: int | None = None
    """SGLang's ``--ep-size``; None: the value in ``rollout.servers.extra_args``, or 1."""
    quantization: Quantization = "none"
    gpus_per_node: int = 8
    """GPUs of a rollout node. A server with more GPUs spans several nodes."""


def plan_of_config(config: Config, options: RefitOptions) -> RefitPlan:
    """Return the plan of a run's refits. Only ``<model.hf_path>/config.json`` of the model is read.

    Raises:
        ValueError: the trainer or the servers do not suit the architecture or each other.
    """
    servers = config.rollout.servers
    server = mesh_of_flags(servers.tensor_parallel, servers.extra_args, expert=options.ep_size)
    return make_plan(
        tabled_architecture(config.model, "a refit plan"),
        config.parallel.mesh(options.world_size),
        [server] * servers.num_servers(options.gpus_per_node),
        quantization=options.quantization,
        element_size=config.model.element_size,
    )


def refusal_of_training(config: Config) -> str | None:
    """Return why ``train`` would refuse the config's layout; None if it accepts it. Plans support more layouts."""
    try:
        check_layout(tabled_architecture(config.model, "a refit plan"), config.parallel)
    except ValueError as error:
        return str(error)
    return None
