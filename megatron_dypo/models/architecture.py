"""A decoder-only model as its HF ``config.json`` describes it, as plain data: no torch, no Megatron, no transformers.

Missing fields get the defaults of the family's configuration class in transformers. docs/hf_models.md lists them, and
the fields that are required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.models.hf.defaults import DEFAULTS, head_dim, key_value_heads, refuse_unsupported
from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.json_file import read_json_object, shown
from megatron_dypo.models.hf.rope_scaling import LinearRopeScaling, RopeScaling, YarnRopeScaling, read_rope

_NORM_EPSILON = 1e-6
_MISTRAL_WINDOW = 4096

FAMILIES = tuple(DEFAULTS)
"""Values of ``model_type`` that have a name table (``megatron_dypo.models.families``)."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that replaces the MLP in every layer."""

    num_experts: int
    per_token: int
    """Number of experts for each token: those with the largest router logits."""
    ffn_hidden_size: int
    """Intermediate size of one expert."""
    normalized: bool
    """Routing weights of a token sum to one (softmax over its chosen experts), or are taken from the softmax over all.
    """
    moe_aux_loss_coef: float
    """``router_aux_loss_coef``: weight of the load-balancing loss."""


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
    sliding_window: int | None = None
    """Number of last tokens that attention sees, the token itself included; None: all."""

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
        raise ValueError(f"{where}: model_type={shown(family)}: must be one of {', '.join(FAMILIES)}")
    refuse_unsupported(fields, family)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    theta, scaling = read_rope(fields)
    return Architecture(
        family=family,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads(fields, heads, DEFAULTS[family]),
        head_dim=head_dim(fields, hidden, heads, DEFAULTS[family]),
        ffn_hidden_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_epsilon=fields.number("rms_norm_eps", _NORM_EPSILON, above=0),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=_experts(fields) if family == "qwen3_moe" else None,
        # Other families name a window that they do not use (``use_sliding_window: false``).
        sliding_window=fields.optional_integer("sliding_window", _MISTRAL_WINDOW) if family == "mistral" else None,
    )


def _experts(fields: Fields) -> Experts:
    # transformers 5 writes the number of experts under either name.
    name = "num_experts" if "num_experts" in fields else "num_local_experts"
    num_experts, per_token = fields.integer(name), fields.integer("num_experts_per_tok")
    if "num_experts" in fields and "num_local_experts" in fields and fields.integer("num_local_experts") != num_experts:
        fields.refuse("num_local_experts", f"must be the same as num_experts={num_experts}")
    if per_token > num_experts:
        fields.refuse("num_experts_per_tok", f"must not exceed {name}={num_experts}")
    if fields.integer("decoder_sparse_step", 1) != 1:
        fields.refuse("decoder_sparse_step", "only 1 is supported")
    if fields.get("mlp_only_layers") not in (None, []):
        fields.refuse("mlp_only_layers", "every layer must have experts")
    normalized = fields.flag("norm_topk_prob", False)
    if normalized and per_token == 1:
        raise ValueError(
            f"{fields.where}: norm_topk_prob=true with num_experts_per_tok=1: every routing weight is 1, so that the "
            "router cannot learn"
        )
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        ffn_hidden_size=fields.integer("moe_intermediate_size"),
        normalized=normalized,
        moe_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001, least=0),
    )
