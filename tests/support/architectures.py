"""Architectures for tests of layouts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hypothesis import strategies as st

from megatron_dypo.models.architecture import FAMILIES, Architecture
from megatron_dypo.models.experts import BiasedSigmoid, Experts
from megatron_dypo.models.latent_attention import LatentAttention
from megatron_dypo.models.windows import Windows


def make_arch(family: str = "llama", **overrides: Any) -> Architecture:
    """Make a small architecture whose sizes are all different."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 20,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 3,
        "ffn_hidden_size": 28,
        "vocab_size": 31,
        "max_position_embeddings": 64,
        "norm_epsilon": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tied_embeddings": False,
    }
    switches: dict[str, Any] = {
        "qkv_bias": family in ("qwen2", "gpt_oss"),
        "qk_norm": family.startswith("qwen3"),
        "experts": None,
    }
    if family == "qwen3_moe":
        switches["experts"] = Experts(
            num_experts=5, per_token=2, ffn_hidden_size=7, normalized=True, moe_aux_loss_coef=0.0
        )
    if family in ("deepseek_v3", "glm4_moe"):
        switches["experts"] = Experts(
            num_experts=6,
            per_token=4,
            ffn_hidden_size=7,
            normalized=True,
            moe_aux_loss_coef=0.0,
            num_dense_layers=1,
            shared_width=14,
            biased_sigmoid=BiasedSigmoid(num_groups=3, top_groups=2, scale=2.5),
        )
    if family == "glm4_moe":
        switches |= {"qkv_bias": True, "qk_norm": True, "rotated_share": 0.7}
    if family == "deepseek_v3":
        switches["latent"] = LatentAttention(query_rank=11, key_value_rank=9, plain_dim=5, rope_dim=4, value_dim=6)
        switches |= {"num_key_value_heads": 8, "head_dim": 9}
    if family == "gpt_oss":
        switches["experts"] = Experts(
            num_experts=5,
            per_token=2,
            ffn_hidden_size=7,
            normalized=True,
            moe_aux_loss_coef=0.0,
            clamp=7.0,
            is_stacked=True,
        )
        switches |= {"windows": Windows(size=8, layers=(0, 2)), "attention_sinks": True, "linear_bias": True}
    return Architecture(**{"family": family, **sizes, **switches, **overrides})


def divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


@st.composite
def sharded_architectures(draw: st.DrawFn) -> tuple[Architecture, int]:
    """Draw an architecture, and a size that divides it by tensor parallelism and by expert tensor parallelism."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    # Megatron-Core lets ranks divide the key heads, or key heads divide the ranks.
    kv_heads = draw(st.one_of(st.integers(1, 3).map(lambda k: k * tp_size), st.sampled_from(divisors(tp_size))))
    heads = math.lcm(kv_heads, tp_size) * draw(st.integers(1, 2))
    arch = make_arch(
        draw(st.sampled_from(FAMILIES)),
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        head_dim=tp_size // math.gcd(tp_size, heads + 2 * kv_heads) * draw(st.integers(1, 3)),
        ffn_hidden_size=tp_size * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 40)),
        tied_embeddings=draw(st.booleans()),
    )
    if arch.experts is not None:
        width = tp_size * draw(st.integers(1, 3))
        shared = 2 * width if arch.experts.shared_width else 0
        experts = dataclasses.replace(arch.experts, ffn_hidden_size=width, shared_width=shared)
        arch = dataclasses.replace(arch, experts=experts)
    return arch, tp_size


QWEN2 = make_arch(
    "qwen2", num_layers=12, hidden_size=56, num_attention_heads=28, head_dim=8, ffn_hidden_size=96, vocab_size=131
)
"""12 layers with the 28 heads of a 7B model."""
