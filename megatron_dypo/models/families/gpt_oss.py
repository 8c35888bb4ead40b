"""gpt-oss: Llama with a bias on every linear layer, a sink for each head, and experts with biases in every layer.

HF folders have one tensor for all experts of a layer. The table names the part of each expert, under the names that
``models/stacked_experts.py`` gives it.
"""

from __future__ import annotations

from megatron_dypo.models.families import llama, qwen2, qwen3_moe
from megatron_dypo.models.families.table import Row, expert_bias, expert_input_bias, hidden, router, sinks
from megatron_dypo.models.rules import ColumnParallel, Copy, GateUp

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}.", _HF_LAYER + "mlp.experts.{expert}."

_EXPERT_WEIGHTS = tuple(row for row in qwen3_moe.EXPERTS if row.is_expert)

ROWS = (
    *llama.COMMON,
    qwen2.QKV_BIAS,
    Row(_ATTENTION + "linear_proj.bias", (_HF_ATTENTION + "o_proj.bias",), Copy(hidden)),
    Row(_ATTENTION + "core_attention.softmax_offset", (_HF_ATTENTION + "sinks",), ColumnParallel(sinks)),
    Row(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.router.weight",), Copy(router)),
    Row(_LAYER + "mlp.router.bias", (_HF_LAYER + "mlp.router.bias",), Copy(expert_bias)),
    *_EXPERT_WEIGHTS,
    Row(
        _EXPERT + "linear_fc1.bias",
        (_HF_EXPERT + "gate_proj.bias", _HF_EXPERT + "up_proj.bias"),
        GateUp(expert_input_bias),
    ),
    Row(_EXPERT + "linear_fc2.bias", (_HF_EXPERT + "down_proj.bias",), Copy(hidden)),
)
