"""Filling the parameters of a model with HF weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.hf.read import HFReader, warn_once


@torch.no_grad()
def load_hf_weights(
    named_params: Iterable[tuple[str, Tensor]],
    reader: HFReader,
    arch: Architecture,
    tp_rank: int,
    tp_size: int,
    *,
    etp_rank: int = 0,
    etp_size: int = 1,
) -> None:
    """Copy into each parameter of this rank its shard, converted to the parameter's dtype and device.

    Names carry the global layer index. Experts are split ``etp_size`` ways, everything else ``tp_size`` ways. Everything is
    checked before the first parameter is written. Weights that are NaN or infinite, also for want of range in the
    parameter's dtype, are loaded with a warning.

    Raises:
        ValueError: a parameter that no rule matches or whose shape differs; an HF tensor missing, unknown or misshapen.
    """
    reader.check_complete(arch)
    matched = [(param, match(name, arch)) for name, param in named_params]
    for param, row in matched:
        size, axis = (etp_size, "expert_tensor_parallel") if row.is_expert else (tp_size, "tensor_parallel")
        shape = row.rule.mcore_shape(arch, size)
        if tuple(param.shape) != shape:
            raise ValueError(f"{row.mcore}: the model holds {tuple(param.shape)}, {axis}={size} asks for {shape}")
    for param, row in matched:
        rank, size = (etp_rank, etp_size) if row.is_expert else (tp_rank, tp_size)
        param.copy_(row.rule.shard([reader.slice(name) for name in row.hf], arch, rank, size))
        if not torch.isfinite(param).all():
            warn_once(f"{reader.path}: {', '.join(row.hf)}: not every weight is a finite number")
