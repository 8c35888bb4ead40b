"""Qwen2 and Qwen2.5: Llama with a bias on query, key and value."""

from __future__ import annotations

from megatron_dypo.models.families import llama
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.rules import QKV

ROWS = (
    *llama.ROWS,
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        tuple(f"model.layers.{{layer}}.self_attn.{name}_proj.bias" for name in "qkv"),
        QKV(bias=True),
    ),
)
