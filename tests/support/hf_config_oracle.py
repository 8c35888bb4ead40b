"""Read a model's configuration by transformers, in the terms of an Architecture, to compare the two field by field."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_dypo.models.architecture import Architecture
from tests.support.hf_models import import_transformers


def config_from(raw: dict[str, Any]) -> Any:
    """Return transformers' configuration for the content of a config.json."""
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()
    return transformers.AutoConfig.for_model(**raw)


def as_transformers_reads(config: Any) -> dict[str, Any]:
    """Return field of :class:`Architecture` → value by transformers; rotary fields are compared by their effect."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, attention_factor = _rotary(config, head_dim)
    is_latent = config.model_type == "deepseek_v3"
    if is_latent:  # head_dim is that of the rotated channels there
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    fields = {
        "family": config.model_type,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tied_embeddings": config.tie_word_embeddings,
        "sliding_window": getattr(config, "sliding_window", None),
        "windows": None,
        "attention_sinks": False,
        "linear_bias": False,
        "frequencies": frequencies,
        "softmax_scale": attention_factor**2 / math.sqrt(head_dim),
    }
    fields["latent"], fields["num_mtp_layers"], fields["rotated_share"] = None, 0, 1.0
    if config.model_type == "glm4_moe":
        fields["rotated_share"] = config.rope_parameters["partial_rotary_factor"]
        fields["softmax_scale"] = 1 / math.sqrt(head_dim)
        fields["rotated_scale"] = attention_factor
    if is_latent:
        fields["latent"] = (
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
    if config.model_type in ("deepseek_v3", "glm4_moe"):
        fields["num_mtp_layers"] = config.num_mtp_layers
        fields["experts"] = (
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            config.norm_topk_prob,
            0.0,
            config.first_k_dense_replace,
            config.n_shared_experts * config.moe_intermediate_size,
            (config.n_group, config.topk_group, config.routed_scaling_factor),
            None,
            False,
        )
    if config.model_type == "qwen3_moe":
        fields["experts"] = (
            config.num_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            config.norm_topk_prob,
            config.router_aux_loss_coef,
            0,
            0,
            None,
            None,
            False,
        )
    if config.model_type == "gpt_oss":
        windowed = [layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
        fields |= {
            "experts": (
                config.num_local_experts,
                config.num_experts_per_tok,
                config.intermediate_size,
                True,
                0.0,
                0,
                0,
                None,
                config.swiglu_limit,
                True,
            ),
            "sliding_window": None,
            "windows": (config.sliding_window, tuple(windowed)) if windowed else None,
            "attention_sinks": True,
            "linear_bias": config.attention_bias,
        }
    return fields


def as_we_read(arch: Architecture) -> dict[str, Any]:
    """Return the same fields of an Architecture."""
    from megatron_dypo.mcore.rope import inverse_frequencies, rotated_scale, softmax_scale

    passed_over = ("rope_scaling", "qkv_bias", "qk_norm", "experts")
    fields = {name: value for name, value in vars(arch).items() if name not in passed_over}
    fields["frequencies"] = inverse_frequencies(arch)
    fields["softmax_scale"] = softmax_scale(arch) or 1 / math.sqrt(arch.head_dim)
    if arch.family == "glm4_moe":
        fields["rotated_scale"] = rotated_scale(arch)
    if arch.experts is not None:
        router = arch.experts.biased_sigmoid
        experts = {**vars(arch.experts), "biased_sigmoid": tuple(vars(router).values()) if router else None}
        fields["experts"] = tuple(experts.values())
    if arch.windows is not None:
        fields["windows"] = tuple(vars(arch.windows).values())
    if arch.latent is not None:
        fields["latent"] = tuple(vars(arch.latent).values())
    return fields


def differences(arch: Architecture, theirs: dict[str, Any]) -> list[str]:
    """Return every field for which :func:`as_transformers_reads` has another value."""
    ours = as_we_read(arch)
    assert ours.keys() == theirs.keys()
    return [f"{name}: {ours[name]} ≠ {theirs[name]}" for name in ours if not _same(ours[name], theirs[name])]


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    return math.isclose(ours, theirs, rel_tol=1e-12) if isinstance(ours, float) else ours == theirs


def _rotary(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config)
    head_dim = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
