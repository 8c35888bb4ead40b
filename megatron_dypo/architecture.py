"""What an HF ``config.json`` says of a decoder-only model, as plain data: no torch, no Megatron, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Values of ``model_type`` that have a name table (``megatron_dypo.weights.families``)."""

ROPE_SCALINGS = ("llama3",)


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that stands in every layer in the place of the MLP."""

    num_experts: int
    per_token: int
    """Experts that each token is routed to, by the largest of its router's logits."""
    ffn_hidden_size: int
    """Intermediate size of one expert."""
    normalized: bool
    """Routing weights of a token sum to one (softmax over its chosen experts), or are taken from the softmax over all."""
    balance_coef: float
    """``router_aux_loss_coef``: weight of the load-balancing loss."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a Llama-like decoder."""

    family: str
    """``model_type`` of the HF config: a row of ``megatron_dypo.weights.families``."""
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
    rope_scaling: Llama3RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None = None
    """None: a dense MLP in every layer."""
    sliding_window: int | None = None
    """Tokens that attention reaches back over, the token itself included; None: to the first."""

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """The smallest multiple of ``tensor_parallel`` that holds the vocabulary."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def check_length(self, num_tokens: int, name: str) -> None:
        """Raise ValueError for sequences, of ``name``, that a sliding window would cut: our attention knows none."""
        if self.sliding_window is not None and num_tokens > self.sliding_window:
            raise ValueError(
                f"{name} = {num_tokens}: must not exceed sliding_window={self.sliding_window} of the {self.family} model, "
                "as attention is computed over whole sequences"
            )


def load_architecture(hf_path: str | Path) -> Architecture:
    """Read ``<hf_path>/config.json``.

    Raises:
        ValueError: an unknown family, a missing or unsupported field; names file, field, value and rule.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; model.hf_path must be an HF model folder")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return architecture_from_hf(raw, where=str(path))


def architecture_from_hf(raw: Mapping[str, Any], *, where: str) -> Architecture:
    """The architecture of an HF config given as a mapping; ``where`` names it in errors."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type={family!r}: must be one of {', '.join(FAMILIES)}")
    _refuse_unsupported(raw, where)
    hidden, heads = _integer(raw, "hidden_size", where), _integer(raw, "num_attention_heads", where)
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    rope = _rope_parameters(raw)
    return Architecture(
        family=family,
        num_layers=_integer(raw, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(raw.get("head_dim") or hidden // heads),
        ffn_hidden_size=_integer(raw, "intermediate_size", where),
        vocab_size=_integer(raw, "vocab_size", where),
        max_position_embeddings=_integer(raw, "max_position_embeddings", where),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope, where),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=_experts(raw, where) if family == "qwen3_moe" else None,
        sliding_window=_sliding_window(raw, where) if family == "mistral" else None,
    )


def _sliding_window(raw: Mapping[str, Any], where: str) -> int | None:
    # Other families name a window that they do not use (``use_sliding_window: false``).
    return None if raw.get("sliding_window") is None else _integer(raw, "sliding_window", where)


def _experts(raw: Mapping[str, Any], where: str) -> Experts:
    # transformers 5 writes the number of experts under either name.
    name = "num_experts" if "num_experts" in raw else "num_local_experts"
    num_experts, per_token = _integer(raw, name, where), _integer(raw, "num_experts_per_tok", where)
    if per_token > num_experts:
        raise ValueError(f"{where}: num_experts_per_tok={per_token}: must not exceed {name}={num_experts}")
    if (raw.get("decoder_sparse_step") or 1) != 1:
        raise ValueError(f"{where}: decoder_sparse_step={raw['decoder_sparse_step']}: only 1 is supported")
    if raw.get("mlp_only_layers"):
        raise ValueError(f"{where}: mlp_only_layers={raw['mlp_only_layers']}: every layer must have experts")
    normalized = bool(raw.get("norm_topk_prob", False))
    if normalized and per_token == 1:
        raise ValueError(
            f"{where}: norm_topk_prob=true with num_experts_per_tok=1: every routing weight is 1, so that the router "
            "cannot learn"
        )
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        ffn_hidden_size=_integer(raw, "moe_intermediate_size", where),
        normalized=normalized,
        balance_coef=float(raw.get("router_aux_loss_coef", 0.001)),
    )


def _integer(raw: Mapping[str, Any], name: str, where: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{where}: {name}={value!r}: must be a positive integer")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    rules = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
    }
    for name, allowed in rules.items():
        if raw.get(name) not in allowed:
            raise ValueError(f"{where}: {name}={raw[name]!r}: only {allowed[0]!r} is supported")


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5), in one mapping."""
    rope: dict[str, Any] = {}
    if "rope_theta" in raw:
        rope["rope_theta"] = raw["rope_theta"]
    rope.update(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    return rope


def _rope_scaling(rope: Mapping[str, Any], where: str) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"{where}: rope_type={kind!r}: must be 'default' or one of {', '.join(ROPE_SCALINGS)}")
    missing = [n for n in Llama3RopeScaling.__dataclass_fields__ if n not in rope]
    if missing:
        raise ValueError(f"{where}: rope_type='llama3' needs {', '.join(missing)}")
    return Llama3RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
