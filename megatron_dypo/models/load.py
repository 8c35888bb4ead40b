"""Loading HF weights into the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.hf.read import HFReader, warn_once
from megatron_dypo.parallel.position import Position


@torch.no_grad()
def load_hf_weights(
    named_params: Iterable[tuple[str, Tensor]],
    reader: HFReader,
    arch: Architecture,
    position: Position,
) -> None:
    """Fill each parameter of the rank at ``position`` with its shard, converted to the parameter's dtype and device.

    Names contain the global layer index. Everything is checked before the first parameter is written. Weights that are
    NaN or infinite, perhaps only after conversion to the parameter's dtype, are loaded with a warning.

    Raises:
        ValueError: no rule matches a parameter, or its shape differs; an HF tensor is missing, unknown or misshapen.
    """
    reader.check_complete(arch)
    matched = [(param, match(name, arch)) for name, param in named_params]
    for param, row in matched:
        axis, (_, size) = "expert_tensor" if row.is_expert else "tensor", position.shard(is_expert=row.is_expert)
        shape = row.rule.mcore_shape(arch, size)
        if tuple(param.shape) != shape:
            raise ValueError(f"{row.mcore}: the model holds {tuple(param.shape)}, {axis}_parallel={size} needs {shape}")
    with progress(len(matched), "initial weights", "tensors", enabled=False) as bar:
        for param, row in matched:
            rank, size = position.shard(is_expert=row.is_expert)
            param.copy_(row.rule.shard([reader.slice(name) for name in row.hf], arch, rank, size))
            if not torch.isfinite(param).all():
                warn_once(f"{reader.path}: {', '.join(row.hf)}: not every weight is a finite number")
            bar.update(1)  # a sign of life for the watchdog
