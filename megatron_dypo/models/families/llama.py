"""Llama: the table that the other families extend."""

from __future__ import annotations

from megatron_dypo.models.families.table import Row, attention_output, hidden, mlp_output, tied, untied
from megatron_dypo.models.rules import QKV, Copy, GateUp, RowParallel, Vocab

_MCORE, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_EMBEDDING = ("model.embed_tokens.weight",)

COMMON = (
    Row("embedding.word_embeddings.weight", _EMBEDDING, Vocab()),
    Row(_MCORE + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Copy(hidden)),
    Row(
        _MCORE + "self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{name}_proj.weight" for name in "qkv"),
        QKV(),
    ),
    Row(
        _MCORE + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), RowParallel(attention_output)
    ),
    Row(_MCORE + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Copy(hidden)),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), Copy(hidden)),
)
"""Rows of every model, without those of MLP or experts."""

MLP = (
    Row(_MCORE + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), GateUp()),
    Row(_MCORE + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), RowParallel(mlp_output)),
)

ROWS = (*COMMON, *MLP)

OUTPUT = Row("output_layer.weight", ("lm_head.weight",), Vocab(), needs=untied)

# With tied embeddings the last stage of a pipeline of two or more holds its own copy of the embedding.
TIED_OUTPUT = Row("output_layer.weight", _EMBEDDING, Vocab(), is_copy=True, needs=tied)
