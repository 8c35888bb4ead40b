"""The servers' side of a plan: how SGLang holds the tensors of a family on one server rank. Pure, no torch, no SGLang.

Source, SGLang 0.5.23: ``models/{llama,qwen2,qwen3,qwen3_moe,deepseek_v2,glm4_moe,gpt_oss}.py``, ``layers/linear.py``
(fused projections, replicated key and value heads), ``layers/vocab_parallel_embedding.py`` (padding) and
``layers/moe/fused_moe_triton/layer.py`` (expert stacks). With ``--attn-dp-size`` ranks that are neighbours share one
copy of attention and of the embedding; MLPs, experts and the output layer are split over all ranks, as without it. Not
supported: shared experts that SGLang fuses with the others, redundant experts, and kernels that reorder weights after
loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.families.table import LAYER, Layers
from megatron_dypo.refit.plan.rectangles import Rectangle
from megatron_dypo.refit.plan.served_latent import latent_attention
from megatron_dypo.refit.plan.served_stacks import stacked_experts
from megatron_dypo.refit.plan.served_tensor import ServedTensor, columns, rows, whole
from megatron_dypo.refit.plan.server_mesh import ServerMesh, check_server_mesh, padded_vocab_size

_LAYER = f"model.layers.{LAYER}."
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def served_tensors(arch: Architecture, server: ServerMesh, server_rank: int) -> list[ServedTensor]:
    """List the parameters of a server rank. Those of a layer occur once, with ``{layer}`` in their names.

    Raises:
        ValueError: the server's mesh does not suit the architecture.
    """
    check_server_mesh(arch, server)
    sizes = {_EMBEDDING: server.attention}
    if not _shares_embedding(arch):
        sizes[_OUTPUT] = server.output
    attention = latent_attention if arch.latent else _attention
    return [
        *(_vocabulary(arch, size, server_rank % size, name) for name, size in sizes.items()),
        *_norms(arch),
        *attention(arch, server.attention, server_rank % server.attention),
        *(_mlp(arch, server.dense, server_rank % server.dense) if arch.num_dense_layers else ()),
        *(_any_experts(arch, arch.experts, server, server_rank) if arch.experts else ()),
        whole("model.norm.weight", (arch.hidden_size,)),
    ]


def _shares_embedding(arch: Architecture) -> bool:
    """Return whether SGLang shares one tensor for embedding and output layer; its Qwen3-MoE and GLM-4.5 never do."""
    return arch.tied_embeddings and (arch.experts is None or arch.latent is not None)


def _vocabulary(arch: Architecture, tensor: int, server_rank: int, name: str) -> ServedTensor:
    """Return a range of the padded vocabulary."""
    local = padded_vocab_size(arch.vocab_size, tensor) // tensor
    start = min(server_rank * local, arch.vocab_size)
    length = min(local, arch.vocab_size - start)
    hf_name = _EMBEDDING if arch.tied_embeddings else name
    return rows(name, (local, arch.hidden_size), [(hf_name, start, length)] if length else [])


def _norms(arch: Architecture) -> Iterator[ServedTensor]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield whole(f"{_LAYER}{name}.weight", (arch.hidden_size,))


def _attention(arch: Architecture, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    """Yield the parameters of a layer's attention."""
    heads, kv_heads = arch.num_attention_heads // tensor, max(arch.num_key_value_heads // tensor, 1)
    replicas = max(tensor // arch.num_key_value_heads, 1)
    query, key = heads * arch.head_dim, kv_heads * arch.head_dim
    prefix = f"{_LAYER}self_attn."

    def fused(kind: str, tail: tuple[int, ...]) -> ServedTensor:
        first_kv = server_rank // replicas * key
        runs = [("q_proj", server_rank * query, query), ("k_proj", first_kv, key), ("v_proj", first_kv, key)]
        return rows(
            f"{prefix}qkv_proj.{kind}",
            (query + 2 * key, *tail),
            [(f"{prefix}{name}.{kind}", start, length) for name, start, length in runs],
        )

    yield fused("weight", (arch.hidden_size,))
    if arch.qkv_bias:
        yield fused("bias", ())
    if arch.qk_norm:
        yield from (whole(f"{prefix}{name}_norm.weight", (arch.head_dim,)) for name in "qk")
    yield columns(f"{prefix}o_proj.weight", (arch.hidden_size, query), server_rank * query)
    if arch.linear_bias:
        yield whole(f"{prefix}o_proj.bias", (arch.hidden_size,))
    if arch.attention_sinks:
        yield rows(f"{prefix}sinks", (heads,), [(f"{prefix}sinks", server_rank * heads, heads)])


def _mlp(arch: Architecture, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    return _gated(f"{_LAYER}mlp.", arch.ffn_hidden_size, arch, tensor, server_rank, "dense")


def _gated(
    prefix: str, width: int, arch: Architecture, tensor: int, server_rank: int, layers: Layers
) -> Iterator[ServedTensor]:
    """Yield the parameters of an MLP, or of all shared experts together."""
    local, hidden = width // tensor, arch.hidden_size
    runs = [(f"{prefix}{name}_proj.weight", server_rank * local, local) for name in ("gate", "up")]
    yield replace(rows(f"{prefix}gate_up_proj.weight", (2 * local, hidden), runs), layers=layers)
    yield replace(columns(f"{prefix}down_proj.weight", (hidden, local), server_rank * local), layers=layers)


def _any_experts(arch: Architecture, experts: Experts, server: ServerMesh, server_rank: int) -> Iterator[ServedTensor]:
    if experts.is_stacked:
        return stacked_experts(arch, experts, server.tensor, server_rank)
    return _experts(arch, experts, server, server_rank)


def _experts(arch: Architecture, experts: Experts, server: ServerMesh, server_rank: int) -> Iterator[ServedTensor]:
    """Yield the router, the MLP that every token passes, and this rank's stacks of experts."""
    hidden, gate = arch.hidden_size, f"{_LAYER}mlp.gate."
    yield replace(whole(f"{gate}weight", (experts.num_experts, hidden)), layers="experts")
    if experts.biased_sigmoid is not None:
        yield replace(whole(f"{gate}e_score_correction_bias", (experts.num_experts,)), layers="experts")
    if experts.shared_width:
        shared = f"{_LAYER}mlp.shared_experts."
        size = server.shared
        yield from _gated(shared, experts.shared_width, arch, size, server_rank % size, "experts")
    for stack in _stacks(experts, hidden, server, server_rank):
        yield replace(stack, layers="experts")


def _stacks(experts: Experts, hidden_size: int, server: ServerMesh, server_rank: int) -> Iterator[ServedTensor]:
    """Yield stacks of this rank's experts. Neighbouring ranks hold the same experts and split their features."""
    split = server.tensor // server.expert
    local, start = experts.ffn_hidden_size // split, server_rank % split * (experts.ffn_hidden_size // split)
    count = experts.num_experts // server.expert
    owned = range(server_rank // split * count, (server_rank // split + 1) * count)
    prefix = f"{_LAYER}mlp.experts."
    inputs = [(f"{prefix}{expert}.{name}_proj.weight", start, local) for expert in owned for name in ("gate", "up")]
    outputs = tuple(
        Rectangle(
            name=f"{prefix}w2_weight",
            row=number * hidden_size,
            col=0,
            hf_name=f"{prefix}{expert}.down_proj.weight",
            hf_row=0,
            hf_col=start,
            rows=hidden_size,
            cols=local,
        )
        for number, expert in enumerate(owned)
    )
    yield rows(f"{prefix}w13_weight", (count, 2 * local, hidden_size), inputs)
    yield ServedTensor(name=f"{prefix}w2_weight", shape=(count, hidden_size, local), rectangles=outputs)
