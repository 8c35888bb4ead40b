"""The ``megatron`` mappings of a config, checked before anything is built."""

from __future__ import annotations

import os

from megatron_dypo.config.tree import Config
from megatron_dypo.mcore.features import Features, shield_imports
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.layout_rules import check_replay


def option_problems(config: Config) -> list[str]:
    """Return a line for each name in a ``megatron`` mapping that is denied or unknown, or whose value has another type.

    This needs no GPU and no model. Megatron is imported only if the config has such a mapping.
    """
    if not any((config.model.megatron, config.parallel.megatron, config.optimizer.megatron)):
        return []
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # as ranks have it, for which this process may go on
    shield_imports()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dypo.mcore.options.denied import MODEL, OPTIMIZER, PARALLEL
    from megatron_dypo.mcore.options.reading import Mapped, read_options

    problems: list[str] = []
    for kind, mapped in (
        (TransformerConfig, Mapped("model.megatron", config.model.megatron, MODEL)),
        (DistributedDataParallelConfig, Mapped("parallel.megatron", config.parallel.megatron, PARALLEL)),
        (OptimizerConfig, Mapped("optimizer.megatron", config.optimizer.megatron, OPTIMIZER)),
    ):
        try:
            read_options(kind, mapped)
        except ValueError as error:
            problems += str(error).splitlines()
    return problems


def require_options(config: Config, arch: Architecture, features: Features) -> None:
    """Require this machine and its Megatron to take every option of the config, alone and together.

    Raises:
        ValueError: names key, value and rule.
    """
    from megatron_dypo.mcore.model import transformer_config
    from megatron_dypo.mcore.optimizer import optimizer_config
    from megatron_dypo.mcore.options.named import data_parallel_config

    if problems := option_problems(config):
        raise ValueError("\n".join(problems))
    features.require(config.parallel, config.optimizer)
    check_replay(arch, config.objective.replay)
    transformer = transformer_config(arch, config.model, config.parallel, features)
    if config.objective.replay != "off" and transformer.moe_router_fusion:
        raise ValueError(
            "model.megatron.moe_router_fusion=true: must be false with objective.replay: a fused router takes no choice"
        )
    data_parallel_config(config.model, config.parallel, use_distributed_optimizer=config.optimizer.distributed)
    optimizer_config(config.optimizer, dtype=config.model.dtype, fp8=config.model.fp8)
