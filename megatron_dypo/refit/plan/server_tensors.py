"""The servers' side of a plan: how SGLang holds the tensors of a family on one server rank. Pure, no torch, no SGLang.

Source, SGLang 0.5.23: ``models/{llama,qwen2,qwen3,qwen3_moe}.py``, ``layers/linear.py`` (fused projections, replicated
key and value heads), ``layers/vocab_parallel_embedding.py`` (padding) and ``layers/moe/fused_moe_triton/layer.py``
(expert stacks). Not supported: attention data parallelism, redundant experts, and kernels that reorder weights after
loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dypo.checks import require, require_positive
from megatron_dypo.models.architecture import Architecture, Experts
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.refit.plan.rectangles import Rectangle

_VOCAB_MULTIPLE = 64
_LAYER = f"model.layers.{LAYER}."
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class ServerMesh:
    """Sizes of the axes of one SGLang server."""

    tensor: int
    """``--tp-size``."""
    expert: int = 1
    """``--ep-size``: each rank holds 1/expert of the experts, each split over tensor / expert ranks."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "expert")


@dataclass(frozen=True, kw_only=True)
class ServedTensor:
    """One parameter of SGLang on one server rank."""

    name: str
    """``{layer}`` stands for the layer."""
    shape: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]
    """The parts of HF tensors that it holds. Its other entries are zeros, for padding."""


def served_tensors(arch: Architecture, server: ServerMesh, server_rank: int) -> list[ServedTensor]:
    """List the parameters of a server rank. Those of a layer occur once, with ``{layer}`` in their names.

    Raises:
        ValueError: the server's mesh does not suit the architecture.
    """
    check_server_mesh(arch, server)
    names = (_EMBEDDING,) if _shares_embedding(arch) else (_EMBEDDING, _OUTPUT)
    return [
        *(_vocabulary(arch, server.tensor, server_rank, name) for name in names),
        *_attention(arch, server.tensor, server_rank),
        *(
            _experts(arch.experts, arch.hidden_size, server, server_rank)
            if arch.experts
            else _mlp(arch, server.tensor, server_rank)
        ),
        _whole("model.norm.weight", (arch.hidden_size,)),
    ]


def check_server_mesh(arch: Architecture, server: ServerMesh) -> None:
    """Raise ValueError unless SGLang can hold the architecture without padded heads or features."""
    tensor, expert, kv_heads = server.tensor, server.expert, arch.num_key_value_heads
    _require_divides(tensor, "num_attention_heads", arch.num_attention_heads)
    require(
        kv_heads % tensor == 0 or tensor % kv_heads == 0,
        f"server tensor={tensor}",
        f"must divide num_key_value_heads={kv_heads} or be a multiple of it",
    )
    if arch.experts is None:
        require(expert == 1, f"server expert={expert}", f"a {arch.family} model has no experts")
        _require_divides(tensor, "intermediate_size", arch.ffn_hidden_size)
        return
    require(tensor % expert == 0, f"server expert={expert}", f"does not divide server tensor={tensor}")
    require(
        arch.experts.num_experts % expert == 0,
        f"server expert={expert}",
        f"does not divide num_experts={arch.experts.num_experts}",
    )
    _require_divides(tensor // expert, "moe_intermediate_size", arch.experts.ffn_hidden_size)


def _require_divides(size: int, name: str, value: int) -> None:
    require(value % size == 0, f"server tensor={size}", f"does not divide {name}={value}")


def _shares_embedding(arch: Architecture) -> bool:
    """Return whether SGLang shares one tensor for embedding and output layer; its Qwen3-MoE never does."""
    return arch.tied_embeddings and arch.experts is None


def _vocabulary(arch: Architecture, tensor: int, server_rank: int, name: str) -> ServedTensor:
    """Return a range of the vocabulary, padded to a multiple of 64, or of 64 × tensor if ranks could not split that."""
    multiple = _VOCAB_MULTIPLE
    if _round_up(arch.vocab_size, multiple) % tensor:
        multiple *= tensor
    local = _round_up(arch.vocab_size, multiple) // tensor
    start = min(server_rank * local, arch.vocab_size)
    length = min(local, arch.vocab_size - start)
    hf_name = _EMBEDDING if arch.tied_embeddings else name
    return _rows(name, (local, arch.hidden_size), [(hf_name, start, length)] if length else [])


def _attention(arch: Architecture, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    """Yield the parameters of a layer's attention and its norms."""
    heads, kv_heads = arch.num_attention_heads // tensor, max(arch.num_key_value_heads // tensor, 1)
    replicas = max(tensor // arch.num_key_value_heads, 1)
    query, key = heads * arch.head_dim, kv_heads * arch.head_dim
    prefix = f"{_LAYER}self_attn."

    def fused(kind: str, tail: tuple[int, ...]) -> ServedTensor:
        first_kv = server_rank // replicas * key
        runs = [("q_proj", server_rank * query, query), ("k_proj", first_kv, key), ("v_proj", first_kv, key)]
        return _rows(
            f"{prefix}qkv_proj.{kind}",
            (query + 2 * key, *tail),
            [(f"{prefix}{name}.{kind}", start, length) for name, start, length in runs],
        )

    yield _whole(f"{_LAYER}input_layernorm.weight", (arch.hidden_size,))
    yield fused("weight", (arch.hidden_size,))
    if arch.qkv_bias:
        yield fused("bias", ())
    if arch.qk_norm:
        yield from (_whole(f"{prefix}{name}_norm.weight", (arch.head_dim,)) for name in "qk")
    yield _columns(f"{prefix}o_proj.weight", (arch.hidden_size, query), server_rank * query)
    yield _whole(f"{_LAYER}post_attention_layernorm.weight", (arch.hidden_size,))


def _mlp(arch: Architecture, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    local = arch.ffn_hidden_size // tensor
    runs = [(f"{_LAYER}mlp.{name}_proj.weight", server_rank * local, local) for name in ("gate", "up")]
    yield _rows(f"{_LAYER}mlp.gate_up_proj.weight", (2 * local, arch.hidden_size), runs)
    yield _columns(f"{_LAYER}mlp.down_proj.weight", (arch.hidden_size, local), server_rank * local)


def _experts(experts: Experts, hidden_size: int, server: ServerMesh, server_rank: int) -> Iterator[ServedTensor]:
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
    yield _whole(f"{_LAYER}mlp.gate.weight", (experts.num_experts, hidden_size))
    yield _rows(f"{prefix}w13_weight", (count, 2 * local, hidden_size), inputs)
    yield ServedTensor(name=f"{prefix}w2_weight", shape=(count, hidden_size, local), rectangles=outputs)


def _whole(name: str, shape: tuple[int, ...]) -> ServedTensor:
    return _rows(name, shape, [(name, 0, shape[0])])


def _rows(name: str, shape: tuple[int, ...], runs: Sequence[tuple[str, int, int]]) -> ServedTensor:
    """Return a parameter that stacks runs of rows; a run is (HF tensor, first row, number of rows)."""
    rectangles, row = [], 0
    cols = shape[-1] if len(shape) > 1 else 1
    for hf_name, start, length in runs:
        rectangles.append(
            Rectangle(name=name, row=row, col=0, hf_name=hf_name, hf_row=start, hf_col=0, rows=length, cols=cols)
        )
        row += length
    return ServedTensor(name=name, shape=shape, rectangles=tuple(rectangles))


def _columns(name: str, shape: tuple[int, int], start: int) -> ServedTensor:
    """Return a parameter that holds columns of the HF tensor of the same name, beginning at ``start``."""
    rectangle = Rectangle(name=name, row=0, col=0, hf_name=name, hf_row=0, hf_col=start, rows=shape[0], cols=shape[1])
    return ServedTensor(name=name, shape=shape, rectangles=(rectangle,))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
