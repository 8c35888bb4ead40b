"""The mesh of one SGLang server: how it splits a model over its ranks. Pure, no torch, no SGLang.

Source, SGLang 0.5.23: ``srt/runtime_context.py`` (``derive_attention_ranks``: the ranks of one copy of attention are
neighbours), ``layers/vocab_parallel_embedding.py``, and the model classes that ``server_tensors.py`` names.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.checks import require, require_positive
from megatron_dypo.models.architecture import Architecture

_ATTENTION_OVER_ALL = ("llama", "mistral", "qwen2")
"""Families whose classes in SGLang split attention over all of ``--tp-size`` (``models/llama.py``, ``qwen2.py``).
Servers of these end at their first request if ranks attend to requests of their own."""
WITH_WHOLE_SHARED = ("deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer")
"""Values of ``--moe-a2a-backend`` with which each rank holds the shared experts whole (``models/deepseek_v2.py``,
``glm4_moe.py``)."""

_VOCAB_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ServerMesh:
    """Sizes of the axes of one SGLang server."""

    tensor: int
    """``--tp-size``."""
    expert: int = 1
    """``--ep-size``: each rank holds 1/expert of the experts, each split over tensor / expert ranks."""
    attention_data: int = 1
    """``--attn-dp-size``: copies of attention and of the embedding, each split over :attr:`attention` ranks."""
    output_by_attention: bool = False
    """``--enable-dp-lm-head``: the output layer too is split over the ranks of one copy of attention."""
    whole_dense: bool = False
    """``--moe-dense-tp-size 1``: each rank holds the MLPs of layers without experts whole."""
    whole_shared: bool = False
    """``--moe-a2a-backend``: each rank holds the shared experts whole."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "expert", "attention_data")
        require(
            self.tensor % self.attention_data == 0,
            f"server attn_dp_size={self.attention_data}",
            f"does not divide server tensor={self.tensor}",
        )

    @property
    def attention(self) -> int:
        """Return the number of ranks that share one copy of attention."""
        return self.tensor // self.attention_data

    @property
    def output(self) -> int:
        """Return the number of ranks that share the output layer."""
        return self.attention if self.output_by_attention else self.tensor

    @property
    def dense(self) -> int:
        """Return the number of ranks that share an MLP of a layer without experts."""
        return 1 if self.whole_dense else self.tensor

    @property
    def shared(self) -> int:
        """Return the number of ranks that share the shared experts."""
        return 1 if self.whole_shared else self.tensor


def mesh_of_settings(
    tensor: int, expert: int, attention_data: int, dense_tensor: int | None, dispatch: str, *, output_by_attention: bool
) -> ServerMesh:
    """Return the mesh of a server by SGLang's settings.

    Args:
        dense_tensor: ``moe_dense_tp_size``; SGLang takes None, 1 and ``tensor``.
        dispatch: ``moe_a2a_backend``.
    """
    return ServerMesh(
        tensor=tensor,
        expert=expert,
        attention_data=attention_data,
        output_by_attention=output_by_attention and attention_data > 1,
        whole_dense=dense_tensor == 1 and tensor > 1,
        whole_shared=dispatch in WITH_WHOLE_SHARED and tensor > 1,
    )


def check_server_mesh(arch: Architecture, server: ServerMesh) -> None:
    """Raise ValueError unless SGLang serves the architecture on this mesh without padded heads or features."""
    check_serving(arch, server)
    attention, expert, kv_heads = server.attention, server.expert, arch.num_key_value_heads
    name = "server tensor" if server.attention_data == 1 else "server tensor / attn_dp_size"
    _require_divides(attention, "num_attention_heads", arch.num_attention_heads, name)
    require(
        kv_heads % attention == 0 or attention % kv_heads == 0,
        f"{name}={attention}",
        f"must divide num_key_value_heads={kv_heads} or be a multiple of it",
    )
    if arch.num_dense_layers:
        _require_divides(server.dense, "intermediate_size", arch.ffn_hidden_size)
    if arch.experts is None:
        require(expert == 1, f"server expert={expert}", f"a {arch.family} model has no experts")
        return
    require(
        expert == 1 or not arch.experts.is_stacked,
        f"server expert={expert}",
        f"must be 1 for a {arch.family} model: SGLang loads stacked experts whole on every rank",
    )
    require(server.tensor % expert == 0, f"server expert={expert}", f"does not divide server tensor={server.tensor}")
    require(
        arch.experts.num_experts % expert == 0,
        f"server expert={expert}",
        f"does not divide num_experts={arch.experts.num_experts}",
    )
    width = "intermediate_size" if arch.experts.is_stacked else "moe_intermediate_size"
    _require_divides(server.tensor // expert, width, arch.experts.ffn_hidden_size)
    _require_divides(server.shared, "n_shared_experts · moe_intermediate_size", arch.experts.shared_width)


def check_serving(arch: Architecture, server: ServerMesh) -> None:
    """Raise ValueError if SGLang accepts the mesh and then computes the architecture wrongly or ends."""
    copies, family = server.attention_data, arch.family
    require(
        copies == 1 or family not in _ATTENTION_OVER_ALL,
        f"server attn_dp_size={copies}",
        f"must be 1 for a {family} model: SGLang splits its attention over all ranks and ends at the first request",
    )
    require(
        not server.whole_dense or arch.experts is not None,
        "server moe_dense_tp_size=1",
        f"must be left out for a {family} model: SGLang splits its MLPs, does not sum their parts and samples nonsense",
    )
    padded = padded_vocab_size(arch.vocab_size, server.attention)
    require(
        not server.output_by_attention or server.attention == 1 or padded == arch.vocab_size,
        "server enable_dp_lm_head=true",
        f"needs a vocabulary unpadded for {server.attention} ranks; vocab_size={arch.vocab_size}, padded {padded}",
    )


def padded_vocab_size(vocab_size: int, ranks: int) -> int:
    """Return the vocabulary as SGLang splits it: padded to a multiple of 64, or of 64 × ranks if they could not split
    that."""
    padded = _round_up(vocab_size, _VOCAB_MULTIPLE)
    return _round_up(vocab_size, _VOCAB_MULTIPLE * ranks) if padded % ranks else padded


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _require_divides(size: int, name: str, value: int, axis: str = "server tensor") -> None:
    require(value % size == 0, f"{axis}={size}", f"does not divide {name}={value}")
