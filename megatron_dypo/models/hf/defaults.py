"""Defaults of transformers' configuration classes for fields that a config.json leaves out, for each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.rope_scaling import DEFAULT_THETA, SECTIONS


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """The values of a family's fields that are missing or null."""

    key_value_heads: int | None
    """Number of key-value heads. None: as many as query heads."""
    null_key_value_heads: bool = False
    """Whether null is allowed, meaning as many as query heads."""
    head_dim: int | None = None
    """Channels of a head. None: hidden size / heads, also for null."""
    null_head_dim: bool = True
    """Whether ``head_dim`` may be null, meaning hidden size / heads."""
    norm_epsilon: float = 1e-6
    """``rms_norm_eps``."""
    attention_bias: bool | None = False
    """The only value of ``attention_bias`` that is supported. None: either."""
    rope_theta: float = DEFAULT_THETA
    rope_scaling: Mapping[str, Any] | None = None
    """``rope_parameters`` of a config that has none, nor ``rope_scaling``. None: no scaling."""
    rotated_share: float | None = None
    """``partial_rotary_factor``. None: only 1 is supported."""
    untied: bool = False
    """Whether ``tie_word_embeddings`` must be false."""


_GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

DEFAULTS = {
    "llama": FamilyDefaults(key_value_heads=None, null_key_value_heads=True),
    "mistral": FamilyDefaults(key_value_heads=8),
    "qwen2": FamilyDefaults(key_value_heads=32, null_key_value_heads=True),
    "qwen3": FamilyDefaults(key_value_heads=32, null_key_value_heads=True, head_dim=128),
    "qwen3_moe": FamilyDefaults(key_value_heads=4),
    "deepseek_v3": FamilyDefaults(key_value_heads=None, null_key_value_heads=True),
    "glm4_moe": FamilyDefaults(
        key_value_heads=8, null_head_dim=False, norm_epsilon=1e-5, attention_bias=None, rotated_share=0.5, untied=True
    ),
    "gpt_oss": FamilyDefaults(
        key_value_heads=8,
        head_dim=64,
        norm_epsilon=1e-5,
        attention_bias=True,
        rope_theta=150_000.0,
        rope_scaling=_GPT_OSS_YARN,
        untied=True,
    ),
}
"""``model_type`` → defaults."""


def key_value_heads(fields: Fields, heads: int, defaults: FamilyDefaults) -> int:
    """Return ``num_key_value_heads``; ValueError if it does not divide ``num_attention_heads``."""
    default = defaults.key_value_heads or heads
    is_null = "num_key_value_heads" in fields and fields.get("num_key_value_heads") is None
    kv_heads = heads if is_null and defaults.null_key_value_heads else fields.integer("num_key_value_heads", default)
    if heads % kv_heads:
        origin = (
            ""
            if "num_key_value_heads" in fields
            else f" (transformers' default for model_type={fields.get('model_type')!r})"
        )
        raise ValueError(
            f"{fields.where}: num_key_value_heads={kv_heads}{origin}: does not divide num_attention_heads={heads}"
        )
    return kv_heads


def head_dim(fields: Fields, hidden: int, heads: int, defaults: FamilyDefaults) -> int:
    """Return the channels of a head. ValueError if the number is odd or contradicts the other sizes."""
    is_null = "head_dim" in fields and fields.get("head_dim") is None
    if defaults.head_dim is not None or fields.get("head_dim") is not None or (is_null and not defaults.null_head_dim):
        channels = fields.integer("head_dim", defaults.head_dim)
    else:
        if hidden % heads:
            fields.refuse(
                "hidden_size", f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
            )
        channels = hidden // heads
    if channels % 2:
        raise ValueError(
            f"{fields.where}: head_dim={channels}: must be even, as rotary positions turn pairs of channels"
        )
    return channels


def with_positions(fields: Fields, defaults: FamilyDefaults) -> Fields:
    """Return the fields with the family's rotary positions where the config gives none, or no ``rope_theta``."""
    sections = [section for name in SECTIONS if (section := fields.object(name))]
    added: dict[str, Any] = {}
    if not sections and defaults.rope_scaling is not None:
        added["rope_parameters"] = defaults.rope_scaling
    if not any("rope_theta" in section for section in (fields, *sections)):
        added["rope_theta"] = defaults.rope_theta
    return replace(fields, values={**fields.values, **added})


def refuse_unsupported(fields: Fields, family: str) -> None:
    """Raise ValueError for a field that needs a computation that this package lacks."""
    defaults = DEFAULTS[family]
    rules = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
    if defaults.attention_bias is not None:
        rules["attention_bias"] = defaults.attention_bias
    if defaults.untied:
        rules["tie_word_embeddings"] = False
    for name, allowed in rules.items():
        value = fields.get(name)
        if value is not None and (type(value) is not type(allowed) or value != allowed):
            fields.refuse(name, f"only {allowed!r} is supported")
    kinds = fields.get("layer_types")
    # transformers ignores this field of a Mistral model, whose window is the same in all layers. gpt-oss reads it.
    if (
        kinds is not None
        and family not in ("mistral", "gpt_oss")
        and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"})
    ):
        fields.refuse("layer_types", "only 'full_attention' is supported")
