"""The layers that a chunk is built of: Transformer Engine's, or Megatron's local ones with packed attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_dypo.mcore.compat.te_experts import patch_te_experts
from megatron_dypo.mcore.features import Features
from megatron_dypo.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def chunk_spec(arch: Architecture, features: Features, layers: Sequence[int]) -> Any:
    """Return what a chunk with these layers is built of: one layer for all, or the layers in order if the model has two
    kinds."""
    if not arch.has_both_kinds:
        return layer_spec(arch, features, has_experts=arch.experts is not None)
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    kinds = {kind: layer_spec(arch, features, has_experts=kind) for kind in (False, True)}
    return TransformerBlockSubmodules(
        layer_specs=[kinds[arch.has_experts(layer)] for layer in layers], layer_norm=_norm(features)
    )


def layer_spec(arch: Architecture, features: Features, *, has_experts: bool) -> ModuleSpec:
    """Return a transformer layer: Transformer Engine's, or Megatron's local one with packed attention."""
    from megatron.core.models.gpt import gpt_layer_specs

    num_experts = arch.experts.num_experts if arch.experts and has_experts else None
    kind = {"qk_layernorm": _norms_of_attention(arch), "multi_latent_attention": arch.latent is not None}
    if features.transformer_engine:
        patch_te_experts()
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, **kind
        )
        if arch.latent is not None:
            from megatron_dypo.mcore.compat.latent_attention import LatentAttentionAsGiven

            spec.submodules.self_attention.module = LatentAttentionAsGiven
        if arch.attention_sinks:
            from megatron_dypo.mcore.core_attention import PackedAttention

            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return _with_our_router(spec, has_experts)
    from megatron_dypo.mcore.core_attention import PackedAttention

    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts, moe_grouped_gemm=False, normalization="RMSNorm", **kind
    )
    attention = spec.submodules.self_attention
    attention.submodules.core_attention = PackedAttention
    if arch.latent is not None:
        from megatron.core.transformer.identity_op import IdentityOp

        from megatron_dypo.mcore.latent_attention import WholeLatentAttention

        attention.module = WholeLatentAttention
        if arch.latent.query_rank is None:
            attention.submodules.q_layernorm = IdentityOp  # core 0.19 refuses a norm that nothing uses
        spec.submodules.sharded_state_dict_keys_map = dict(_FUSED_NORMS)
    return _with_our_router(spec, has_experts)


_FUSED_NORMS = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Norms of latent attention's local layers → their names where Transformer Engine fuses them, for checkpoints."""


def _norms_of_attention(arch: Architecture) -> bool:
    return arch.qk_norm or arch.latent is not None


def _norm(features: Features) -> Any:
    """Return the class of the norm after the last layer."""
    if features.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


def _with_our_router(spec: ModuleSpec, has_experts: bool) -> ModuleSpec:
    if has_experts:
        from megatron_dypo.mcore.moe_router import BalancedRouter

        mlp = spec.submodules.mlp
        # A ModuleSpec up to core 0.17, functools.partial(MoELayer, submodules=...) since 0.18.
        experts = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        experts.router = BalancedRouter
        # The local spec would store the norm before experts as fused with their input projection; TE's spec does not.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec
