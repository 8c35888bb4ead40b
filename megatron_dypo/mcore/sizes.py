"""Megatron's fields for the sizes and switches of an architecture, whatever the layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from megatron_dypo.mcore.rope import latent_scale, softmax_scale
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts


def sizes(arch: Architecture) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` (with latent attention, ``MLATransformerConfig``)."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "softmax_scale": softmax_scale(arch),
        "ffn_hidden_size": arch.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": arch.linear_bias,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm or arch.latent is not None,
        **_latent(arch),
        **_clamped(arch.experts),
        **_windowed(arch),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **NO_INITIAL_VALUES,
    }


def _latent(arch: Architecture) -> dict[str, Any]:
    if arch.latent is None:
        return {}
    return {
        "q_lora_rank": arch.latent.query_rank,
        "kv_lora_rank": arch.latent.key_value_rank,
        "qk_head_dim": arch.latent.plain_dim,
        "qk_pos_emb_head_dim": arch.latent.rope_dim,
        "v_head_dim": arch.latent.value_dim,
        "rope_type": "rope",  # without scaling: _build_chunk sets the frequencies
        "rotary_base": arch.rope_theta,
        **latent_scale(arch),
    }


def _clamped(experts: Experts | None) -> dict[str, Any]:
    if experts is None or experts.clamp is None:
        return {}
    return {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "activation_func_clamp_value": experts.clamp}


def _windowed(arch: Architecture) -> dict[str, Any]:
    """Return what the core attention of ``core_attention.py`` reads. A window does not count the token itself."""
    softmax = {"softmax_type": "learnable"} if arch.attention_sinks else {}
    if arch.windows is None:
        return softmax
    windowed = [int(layer in arch.windows.layers) for layer in range(arch.num_layers)]
    return {**softmax, "window_size": (arch.windows.size - 1, 0), "window_attn_skip_freq": windowed}


def _leave_as_is(weight: torch.Tensor) -> None:
    """Do not initialise: keep the uninitialised memory."""


NO_INITIAL_VALUES = {
    "init_method": _leave_as_is,
    "output_layer_init_method": _leave_as_is,
    "embedding_init_method": _leave_as_is,
}
"""Weights are loaded later, so no random values are drawn. ``perform_initialization=False`` would leave parameters
without their tensor-parallel marks, and gradient norms would be wrong."""
