"""A decoder-only model as its HF ``config.json`` describes it, as plain data: no torch, no Megatron, no transformers.

Missing fields get the defaults of the family's configuration class in transformers. docs/hf_models.md lists them, and
the fields that are required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.models.experts import Experts, read_experts
from megatron_dypo.models.hf.defaults import (
    DEFAULTS,
    FamilyDefaults,
    head_dim,
    key_value_heads,
    refuse_unsupported,
    with_positions,
)
from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.json_file import read_json_object, shown
from megatron_dypo.models.hf.rope_scaling import (
    LinearRopeScaling,
    RopeScaling,
    YarnRopeScaling,
    read_rope,
    read_rotated_share,
)
from megatron_dypo.models.latent_attention import LatentAttention, read_latent_attention
from megatron_dypo.models.windows import Windows, read_windows

_MISTRAL_WINDOW = 4096
"""Only Mistral has a window on every layer. Qwen names one that it does not use (``use_sliding_window: false``)."""

FAMILIES = tuple(DEFAULTS)
"""Values of ``model_type`` that have a name table (``megatron_dypo.models.families``)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a Llama-like decoder."""

    family: str
    """``model_type`` of the HF config: a row of ``megatron_dypo.models.families``."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None = None
    """None: a dense MLP in every layer."""
    latent: LatentAttention | None = None
    """None: a query, a key and a value of ``head_dim`` channels for each head."""
    rotated_share: float = 1.0
    """``partial_rotary_factor``: the share of a head's channels, from the first on, that are rotated."""
    num_mtp_layers: int = 0
    """Layers after the last one that predict further tokens. They are not trained: their tensors are only carried from
    one HF folder to another."""
    sliding_window: int | None = None
    """Number of last tokens that attention sees, the token itself included; None: all."""
    windows: Windows | None = None
    """The layers whose attention sees only a window, of which sequences may be longer; None: none."""
    attention_sinks: bool = False
    """Whether each head has a learned logit that takes a share of every softmax over the scores and has no value."""
    linear_bias: bool = False
    """Whether every linear layer has a bias: those of attention, the router and the experts."""

    @property
    def is_bridged(self) -> bool:
        """Return whether the family has no name table: names come from Megatron-Bridge."""
        return self.family not in FAMILIES

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts instead of an MLP."""
        return self.experts is not None and layer >= self.experts.num_dense_layers

    @property
    def num_dense_layers(self) -> int:
        """Return how many layers have a dense MLP: the first ones."""
        return self.num_layers if self.experts is None else self.experts.num_dense_layers

    @property
    def has_both_kinds(self) -> bool:
        """Return whether some layers have experts and others have a dense MLP."""
        return 0 < self.num_dense_layers < self.num_layers

    @property
    def rotary_dim(self) -> int:
        """Return how many channels of a query or key head are rotated."""
        return self.latent.rope_dim if self.latent else int(self.head_dim * self.rotated_share)

    @property
    def value_dim(self) -> int:
        """Return the channels of a value head."""
        return self.latent.value_dim if self.latent else self.head_dim

    def cached_channels(self, tensor_parallel: int) -> int:
        """Return the channels of keys and values that each of a server's ranks keeps for a token of one layer. Latent
        vectors are whole on every rank."""
        if self.latent is not None:
            return self.latent.key_value_rank + self.latent.rope_dim
        return 2 * max(1, self.num_key_value_heads // tensor_parallel) * self.head_dim

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Return the smallest multiple of ``tensor_parallel`` that holds the vocabulary."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def check_length(self, num_tokens: int, name: str) -> None:
        """Raise ValueError for sequences longer than the sliding window, which attention here does not implement.

        ``name`` is the name of the length in the message.
        """
        if self.sliding_window is not None and num_tokens > self.sliding_window:
            raise ValueError(
                f"{name} = {num_tokens}: must not exceed sliding_window={self.sliding_window} of the {self.family} "
                "model, as attention is computed over whole sequences"
            )

    @property
    def num_positions(self) -> int:
        """Return the length of the longest sequence that the model supports, scaling included."""
        scaling = self.rope_scaling
        if isinstance(scaling, LinearRopeScaling):
            return int(self.max_position_embeddings * scaling.factor)
        if isinstance(scaling, YarnRopeScaling):
            # Some configs give the positions before scaling (Qwen2.5), others those after it.
            reach = int(scaling.original_max_position_embeddings * scaling.factor)
            return max(self.max_position_embeddings, reach)
        return self.max_position_embeddings

    def check_positions(self, num_tokens: int) -> str | None:
        """Return a warning if ``num_tokens`` exceeds the model's positions, or those that SGLang serves by default;
        else None."""
        if num_tokens <= self.num_positions:
            return None
        is_scaled = self.rope_scaling is not None and self.num_positions > self.max_position_embeddings
        scaled = f" under {self.rope_scaling.rope_type} scaling" if self.rope_scaling and is_scaled else ""
        return (
            f"sequences of up to {num_tokens} tokens: the model supports {self.num_positions} "
            f"(max_position_embeddings={self.max_position_embeddings}{scaled}); tokens beyond them are likely to be "
            "noise, and SGLang may refuse them"
        )

    def check_serving(self, num_tokens: int) -> str | None:
        """Return a warning if SGLang computes or serves sequences of ``num_tokens`` tokens differently; else None.

        SGLang 0.5 ignores YaRN's ``attention_factor``, and does not multiply ``max_position_embeddings`` by the factor.
        """
        scaling = self.rope_scaling
        if not isinstance(scaling, YarnRopeScaling):
            return None
        if abs(scaling.attention_factor - scaling.served_attention_factor) > 1e-6:
            return (
                f"attention_factor={scaling.attention_factor:g} of the yarn scaling: SGLang ignores it and uses "
                f"{scaling.served_attention_factor:g}, so that servers sample from another policy"
            )
        if self.max_position_embeddings < num_tokens <= self.num_positions:
            return (
                f"sequences of up to {num_tokens} tokens on max_position_embeddings={self.max_position_embeddings}: "
                f"SGLang needs --context-length {self.num_positions} to serve them, as YaRN's factor does not "
                "lengthen its limit"
            )
        return None


def load_architecture(hf_path: str | Path) -> Architecture:
    """Read ``<hf_path>/config.json``.

    Raises:
        ValueError: an unknown family, a missing or unsupported field; names file, field, value and rule.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; model.hf_path must be an HF model folder")
    return architecture_from_hf(read_json_object(path), where=str(path))


def architecture_from_hf(raw: Mapping[str, Any], *, where: str) -> Architecture:
    """Return the architecture of an HF config given as a mapping; ``where`` names it in errors.

    Raises:
        ValueError: as :func:`load_architecture`.
    """
    fields, family = Fields(values=raw, where=where), raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={shown(family)}: must be one of {', '.join(FAMILIES)}, which have name tables "
            "(model.family=bridge trains some others: docs/hf_models.md)"
        )
    refuse_unsupported(fields, family)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers, defaults = fields.integer("num_hidden_layers"), DEFAULTS[family]
    theta, scaling = read_rope(with_positions(fields, defaults), is_partial=defaults.rotated_share is not None)
    latent = read_latent_attention(fields, heads, scaling) if family == "deepseek_v3" else None
    channels = latent.query_dim if latent else head_dim(fields, hidden, heads, defaults)
    return Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads(fields, heads, defaults),
        head_dim=channels,
        ffn_hidden_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_epsilon=fields.number("rms_norm_eps", defaults.norm_epsilon, above=0),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=_qkv_bias(fields, family, defaults),
        qk_norm=family in ("qwen3", "qwen3_moe") or (family == "glm4_moe" and fields.flag("use_qk_norm", False)),
        experts=read_experts(fields, num_layers),
        latent=latent,
        rotated_share=_rotated_share(fields, channels, defaults),
        num_mtp_layers=_mtp_layers(fields) if family in ("deepseek_v3", "glm4_moe") else 0,
        sliding_window=fields.optional_integer("sliding_window", _MISTRAL_WINDOW) if family == "mistral" else None,
        windows=read_windows(fields, num_layers) if family == "gpt_oss" else None,
        attention_sinks=family == "gpt_oss",
        linear_bias=family == "gpt_oss",
    )


def _qkv_bias(fields: Fields, family: str, defaults: FamilyDefaults) -> bool:
    if defaults.attention_bias is False:
        return family == "qwen2"
    return fields.flag("attention_bias", bool(defaults.attention_bias))


def _rotated_share(fields: Fields, channels: int, defaults: FamilyDefaults) -> float:
    if defaults.rotated_share is None:
        return 1.0
    share = read_rotated_share(fields, defaults.rotated_share)
    if not int(channels * share) or int(channels * share) % 2:
        raise ValueError(
            f"{fields.where}: partial_rotary_factor={share:g} of head_dim={channels}: must give an even number of "
            "channels, as rotary positions turn pairs"
        )
    return share


def _mtp_layers(fields: Fields) -> int:
    # transformers 5 reads the number under either name. 0 stands for none, and Fields.integer is for sizes.
    name = "num_nextn_predict_layers" if "num_nextn_predict_layers" in fields else "num_mtp_layers"
    return 0 if fields.get(name) == 0 else fields.integer(name, 1)
