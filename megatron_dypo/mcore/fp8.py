"""Megatron's settings for FP8, and weights that exist only in FP8.

:mod:`megatron_dypo.mcore.features` checks whether the machine can run a recipe, and
:mod:`megatron_dypo.models.layout_rules` whether the sizes suit it. Parameters are quantised with
``Fp8Config.param_gather``; the functions leave other parameters unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.module import MegatronModule

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.mcore.chunks import named_global_parameters, named_global_weights


def layer_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig``."""
    if not fp8.is_on:
        return {}
    settings: dict[str, Any] = {
        "fp8": fp8.element_format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": bool(fp8.first_layers_bf16 or fp8.last_layers_bf16),
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }
    if fp8.recipe == "delayed":
        settings["fp8_margin"] = fp8.margin
        settings["fp8_amax_history_len"] = fp8.amax_history_len
        settings["fp8_amax_compute_algo"] = fp8.amax_compute_algo
    return settings


def gather_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Return the arguments of ``DistributedDataParallelConfig``.

    MXFP8 weights have two quantised copies, by rows and by columns. Megatron can only gather them in bf16, through the
    memory of the gradients, and quantise them on arrival.
    """
    if not fp8.param_gather:
        return {}
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": fp8.recipe == "mxfp8"}


def optimizer_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Return the arguments of Megatron's ``OptimizerConfig``; there are none for bf16 parameters."""
    if not fp8.param_gather:
        return {}
    return {"fp8_recipe": fp8.recipe, "reuse_grad_buf_for_mxfp8_param_ag": fp8.recipe == "mxfp8"}


def named_values(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``named_global_weights`` one by one. Quantised parameters are dequantised to their nominal type."""
    for name, weight in named_global_weights(chunks):
        yield name, values(weight)


def values(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter, or a dequantised copy."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter


def named_initial_values(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors to write initial weights into: parameters, or the exact values behind quantised ones.

    Transformer Engine keeps the exact values on the CPU until the optimizer makes its main parameters from them. They
    are uninitialised memory when the model is built. So code that writes a quantised parameter must write them too.
    """
    return [
        (name, _exact(weight) if is_float8tensor(weight) else weight) for name, weight in named_global_weights(chunks)
    ]


@torch.no_grad()
def quantize_initial_values(chunks: Sequence[torch.nn.Module]) -> None:
    """Fill quantised parameters from their exact values, after :func:`named_initial_values` were written."""
    for _, parameter in named_global_parameters(chunks):
        if is_float8tensor(parameter):
            parameter.copy_(_exact(parameter))


@torch.no_grad()
def adopt_initial_values(chunks: Sequence[torch.nn.Module]) -> None:
    """Set the exact initial values from the quantised parameters, after those themselves were written."""
    for _, parameter in named_global_parameters(chunks):
        if is_float8tensor(parameter):
            _exact(parameter).copy_(values(parameter))


def _exact(parameter: Any) -> torch.Tensor:
    exact: torch.Tensor = parameter.get_high_precision_init_val()
    return exact


def forget_quantized_weights(chunks: Sequence[MegatronModule]) -> None:
    """Make the next forward pass quantise bf16 weights again, after other code changed them.

    Transformer Engine quantises weights at the first microbatch of a pass and keeps the result for the others
    (``is_first_microbatch``). Megatron's schedules request this at each pass too, but code that changes weights should
    not depend on that.
    """
    for chunk in chunks:
        chunk.set_is_first_microbatch()
