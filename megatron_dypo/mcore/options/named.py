"""Keys of the config that set options of Megatron by a name of this package."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore import fp8
from megatron_dypo.mcore.options.denied import PARALLEL
from megatron_dypo.mcore.options.reading import Mapped, make


def data_parallel_config(
    model: ModelConfig, parallel: ParallelConfig, **switches: bool
) -> DistributedDataParallelConfig:
    """Return Megatron's configuration of the data-parallel wrapper; ``switches`` are fields of it.

    Raises:
        ValueError: ``parallel.megatron`` names a field that is denied, unknown or of another type.
    """
    return make(
        DistributedDataParallelConfig,
        Mapped("parallel.megatron", parallel.megatron, PARALLEL),
        **{"grad_reduce_in_fp32": True, **switches, **fp8.gather_settings(model.fp8)},
    )


def recompute(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig`` for the activations to compute again."""
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    return {}


def dispatcher(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig`` for the way of tokens to their experts."""
    if parallel.expert_dispatcher == "alltoall":
        # The default dispatcher forbids variable lengths, even where there are no experts.
        return {"moe_token_dispatcher_type": "alltoall"}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": parallel.expert_dispatcher}


def named(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the keys of the config whose values Megatron itself may refuse."""
    named: dict[str, Any] = {}
    if model.recompute == "selective":
        named["model.recompute_modules"] = list(model.recompute_modules)
    if parallel.expert_dispatcher != "alltoall":
        named["parallel.expert_dispatcher"] = parallel.expert_dispatcher
    return named
