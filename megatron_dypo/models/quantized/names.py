"""The tensors of an HF checkpoint that are quantised, and the names of their scales: names only, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Quantization = Literal["none", "fp8_block", "fp8_channel"]

BLOCK = 128
"""Rows and columns of a block of ``fp8_block``, as in DeepSeek-V3's checkpoints."""

NO_REFIT = (
    "with experts in MXFP4 (quantization_config of its config.json), which no refit replaces: convert the folder to "
    "bf16 first (docs/hf_models.md)"
)
"""Why servers cannot serve such a folder, for messages that name it before."""

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp|mlp\.experts\.\d+)\.\w+_proj\.weight")
_SCALE_SUFFIX = {"fp8_block": "weight_scale_inv", "fp8_channel": "weight_scale"}


def is_quantized(hf_name: str) -> bool:
    """Return whether a tensor is stored in FP8: linear weights of attention, MLP and experts.

    Embedding, output layer, norms, the router (``mlp.gate``) and biases keep their type.
    """
    return _LINEAR.fullmatch(hf_name) is not None


def scale_name(hf_name: str, quantization: Quantization) -> str:
    """Return the name of the scales of a quantised tensor.

    scale_name("model.layers.0.mlp.up_proj.weight", "fp8_block") → "model.layers.0.mlp.up_proj.weight_scale_inv"
    """
    return hf_name.removesuffix("weight") + _SCALE_SUFFIX[quantization]


def block_shape(quantization: Quantization, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that share one scale in a weight of shape [N, K]: 128×128, or a whole row."""
    return (BLOCK, BLOCK) if quantization == "fp8_block" else (1, shape[1])


def scale_shape(quantization: Quantization, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a weight [N, K]: one for each block, including partial blocks at the edges."""
    rows, cols = block_shape(quantization, shape)
    return -(-shape[0] // rows), -(-shape[1] // cols)


def is_scale(hf_name: str) -> bool:
    """Return whether a tensor of a quantised checkpoint holds scales."""
    return hf_name.rpartition(".")[2] in _SCALE_SUFFIX.values()


def weight_name(hf_name: str) -> str:
    """Return the name of the quantised tensor of some scales, the inverse of :func:`scale_name`."""
    return hf_name.removesuffix(hf_name.rpartition(".")[2]) + "weight"


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` says that the weights of experts are in MXFP4."""
    said = config.get("quantization_config")
    return isinstance(said, Mapping) and said.get("quant_method") == "mxfp4"
