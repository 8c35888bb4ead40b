"""Qwen2 and Qwen2.5: Llama with a bias on query, key and value."""

from __future__ import annotations

from megatron_dypo.models.families import llama
from megatron_dypo.models.families.table import Row, biased_qkv
from megatron_dypo.models.rules import QKV

QKV_BIAS = Row(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    tuple(f"model.layers.{{layer}}.self_attn.{name}_proj.bias" for name in "qkv"),
    QKV(bias=True),
    needs=biased_qkv,
)

ROWS = (*llama.ROWS, QKV_BIAS)
