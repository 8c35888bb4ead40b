"""Multi-head latent attention as SGLang holds it on one server rank (0.5.23, ``models/deepseek_v2.py``,
``DeepseekV2AttentionMLA``). Pure, no torch, no SGLang.

Down-projections are whole on every rank; with latent queries SGLang fuses both in one parameter. From ``kv_b_proj``
SGLang derives the tensors ``w_kc`` and ``w_vc``, which are no parameters: the receiver asks for them anew after each
refit (:mod:`megatron_dypo.refit.receiver`).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.table import LAYER, latent
from megatron_dypo.refit.plan.served_tensor import ServedTensor, columns, rows, whole

_PREFIX = f"model.layers.{LAYER}.self_attn."


def latent_attention(arch: Architecture, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    """Yield the parameters of a layer's attention."""
    sizes, hidden, heads = latent(arch), arch.hidden_size, arch.num_attention_heads // tensor
    down = sizes.key_value_rank + sizes.rope_dim
    query, key_value = heads * sizes.query_dim, heads * (sizes.plain_dim + sizes.value_dim)

    def share(name: str, count: int, width: int) -> ServedTensor:
        return rows(f"{_PREFIX}{name}", (count, width), [(f"{_PREFIX}{name}", server_rank * count, count)])

    if sizes.query_rank is None:
        yield share("q_proj.weight", query, hidden)
        yield whole(f"{_PREFIX}kv_a_proj_with_mqa.weight", (down, hidden))
    else:
        runs = [("q_a_proj", 0, sizes.query_rank), ("kv_a_proj_with_mqa", 0, down)]
        yield rows(
            f"{_PREFIX}fused_qkv_a_proj_with_mqa.weight",
            (sizes.query_rank + down, hidden),
            [(f"{_PREFIX}{name}.weight", start, length) for name, start, length in runs],
        )
        yield whole(f"{_PREFIX}q_a_layernorm.weight", (sizes.query_rank,))
        yield share("q_b_proj.weight", query, sizes.query_rank)
    yield whole(f"{_PREFIX}kv_a_layernorm.weight", (sizes.key_value_rank,))
    yield share("kv_b_proj.weight", key_value, sizes.key_value_rank)
    width = heads * sizes.value_dim
    yield columns(f"{_PREFIX}o_proj.weight", (hidden, width), server_rank * width)
