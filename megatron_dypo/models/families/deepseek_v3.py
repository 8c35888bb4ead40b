"""DeepSeek-V3, and Moonlight, Kimi-K2 and others of its type: multi-head latent attention; after some dense layers,
experts beside an MLP that every token passes.

Down-projections are whole on every tensor-parallel rank, as in Transformer Engine's layers. The router's bias is a
buffer that no gradient trains.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_dypo.models.families import llama, qwen3_moe
from megatron_dypo.models.families.table import (
    Row,
    compressed_query,
    expert_bias,
    key_value_down,
    key_value_latent,
    key_value_up,
    plain_query,
    query,
    query_down,
    query_latent,
    query_up,
    shared_input,
    shared_output,
)
from megatron_dypo.models.rules import ColumnParallel, Copy, GateUp, RowParallel

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_SHARED, _HF_SHARED = _LAYER + "mlp.shared_experts.", _HF_LAYER + "mlp.shared_experts."

EXPERT_BIAS = "mlp.router.expert_bias"

_KEYS_AND_VALUES = (
    Row(
        _ATTENTION + "linear_kv_down_proj.weight", (_HF_ATTENTION + "kv_a_proj_with_mqa.weight",), Copy(key_value_down)
    ),
    Row(_ATTENTION + "kv_layernorm.weight", (_HF_ATTENTION + "kv_a_layernorm.weight",), Copy(key_value_latent)),
    Row(_ATTENTION + "linear_kv_up_proj.weight", (_HF_ATTENTION + "kv_b_proj.weight",), ColumnParallel(key_value_up)),
)
_PLAIN_QUERY = (Row(_ATTENTION + "linear_q_proj.weight", (_HF_ATTENTION + "q_proj.weight",), ColumnParallel(query)),)
_COMPRESSED_QUERY = (
    Row(_ATTENTION + "linear_q_down_proj.weight", (_HF_ATTENTION + "q_a_proj.weight",), Copy(query_down)),
    Row(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_a_layernorm.weight",), Copy(query_latent)),
    Row(_ATTENTION + "linear_q_up_proj.weight", (_HF_ATTENTION + "q_b_proj.weight",), ColumnParallel(query_up)),
)
EXPERTS = (
    *(replace(row, layers="experts") for row in qwen3_moe.EXPERTS),
    Row(
        _LAYER + EXPERT_BIAS,
        (_HF_LAYER + "mlp.gate.e_score_correction_bias",),
        Copy(expert_bias),
        layers="experts",
    ),
    Row(
        _SHARED + "linear_fc1.weight",
        (_HF_SHARED + "gate_proj.weight", _HF_SHARED + "up_proj.weight"),
        GateUp(shared_input),
        layers="experts",
    ),
    Row(
        _SHARED + "linear_fc2.weight", (_HF_SHARED + "down_proj.weight",), RowParallel(shared_output), layers="experts"
    ),
)
"""Rows of the layers with experts: the router and its bias, the experts, and the MLP that every token passes."""

ROWS = (
    *(row for row in llama.COMMON if not row.mcore.endswith("linear_qkv.weight")),
    *(replace(row, layers="dense") for row in llama.MLP),
    *EXPERTS,
    *_KEYS_AND_VALUES,
    *(replace(row, needs=compressed_query) for row in _COMPRESSED_QUERY),
    *(replace(row, needs=plain_query) for row in _PLAIN_QUERY),
)
"""With ``q_lora_rank: null``, as in Moonlight, queries come from the hidden state (``plain_query``)."""
