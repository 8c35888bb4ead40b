"""Qwen3: Llama with a norm of each query and key head."""

from __future__ import annotations

from megatron_dypo.models.families import llama
from megatron_dypo.models.families.table import Row, head, normed_heads
from megatron_dypo.models.rules import Copy

HEAD_NORMS = tuple(
    Row(
        f"decoder.layers.{{layer}}.self_attention.{name}_layernorm.weight",
        (f"model.layers.{{layer}}.self_attn.{name}_norm.weight",),
        Copy(head),
        needs=normed_heads,
    )
    for name in "qk"
)

ROWS = (*llama.ROWS, *HEAD_NORMS)
