"""Megatron's multi-head latent attention with the norms of its layer spec, in every core."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_dypo.mcore.compat.core_version import CORE
from megatron_dypo.mcore.compat.private_name import PrivateName

_PROJECTIONS = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")

if CORE >= (0, 19):
    RESOLVE_NORMS = PrivateName(
        package="megatron-core",
        module="megatron.core.transformer.multi_latent_attention",
        name="MLASelfAttention._resolve_qk_norm_config",
        source="NVIDIA/Megatron-LM core_v0.19.2 megatron/core/transformer/multi_latent_attention.py:631",
        oldest="0.19",
        takes=("submodules",),
    )
    """Replaces norms and projections of the layer spec. With ``qk_layernorm`` and without latent queries it puts a norm
    before ``linear_q_proj``, which models of DeepSeek-V3's type have not."""
    RESOLVE_NORMS.get()


class LatentAttentionAsGiven(MLASelfAttention):
    """Latent attention of the modules that the layer spec names."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return {name: getattr(submodules, name) for name in _PROJECTIONS}
