"""The end of an optimizer step: copying fp32 main parameters into the model's parameters."""

from __future__ import annotations

from typing import Any

from megatron_dypo.mcore.compat.private_name import PrivateName

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_SOURCE = "NVIDIA/Megatron-LM core_v0.16.1 megatron/core/optimizer/optimizer.py:583-585 (step_with_ready_grads)"

TO_BUFFER = PrivateName(
    package="megatron-core",
    module=_OPTIMIZER,
    name="DistributedOptimizer._copy_main_params_to_param_buffer",
    source=_SOURCE,
    oldest="0.14",
)
"""Copies main parameters into the buffer from which ranks gather MXFP8 parameters."""

TO_MODEL = PrivateName(
    package="megatron-core",
    module=_OPTIMIZER,
    name="DistributedOptimizer._copy_main_params_to_model_params",
    source=_SOURCE,
    oldest="0.12",
)
"""Copies main parameters into this rank's shards of the model's parameters."""


def copy_main_params(optimizer: Any) -> None:
    """Copy a distributed optimizer's main parameters into the buffers from which parameters are gathered."""
    copy = TO_BUFFER if optimizer.config.reuse_grad_buf_for_mxfp8_param_ag else TO_MODEL
    copy.get()(optimizer)
