"""The windows and the clamped experts of gpt-oss, as its HF ``config.json`` describes them: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_dypo.models.experts import Experts
from megatron_dypo.models.hf.fields import Fields

ALPHA = 1.702
"""Gain in the sigmoid of a gate. Megatron's ``quick_gelu`` has no other."""
_THETA = 150_000.0
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_WINDOWED, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The layers whose attention sees only the last tokens."""

    size: int
    """Number of last tokens that attention sees, the token itself included."""
    layers: tuple[int, ...]
    """Those layers, counted from 0."""


def windows_from_data(fields: Mapping[str, Any] | None) -> Windows | None:
    """Return the windows from their ``dataclasses.asdict``."""
    return None if fields is None else Windows(size=fields["size"], layers=tuple(fields["layers"]))


def read_windows(fields: Fields, num_layers: int) -> Windows | None:
    """Return the windows of a config; None if every layer sees all tokens.

    Raises:
        ValueError: ``layer_types`` or ``sliding_window`` is out of its range.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_FULL if layer % 2 else _WINDOWED for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(map(str, kinds)) <= {_WINDOWED, _FULL}:
        fields.refuse("layer_types", f"must list num_hidden_layers={num_layers} times {_WINDOWED!r} or {_FULL!r}")
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _WINDOWED)
    return Windows(size=fields.integer("sliding_window", 128), layers=layers) if layers else None


def read_clamped_experts(fields: Fields) -> Experts:
    """Return the experts of a config.

    ``router_aux_loss_coef`` is not read: transformers applies it only under ``output_router_logits``.

    Raises:
        ValueError: a field is missing, out of its range, or asks for what is not supported.
    """
    name = "num_experts" if "num_experts" in fields else "num_local_experts"
    num_experts, per_token = fields.integer(name), fields.integer("num_experts_per_tok")
    if not 2 <= per_token <= num_experts:
        fields.refuse("num_experts_per_tok", f"must be from 2 to {name}={num_experts}: a single weight is always 1")
    for alpha in ("swiglu_alpha", "hidden_act_alpha"):  # transformers' name, SGLang's name
        if fields.get(alpha) not in (None, ALPHA):
            fields.refuse(alpha, f"only {ALPHA} is supported")
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        ffn_hidden_size=fields.integer("intermediate_size"),
        normalized=True,
        moe_aux_loss_coef=0.0,
        clamp=fields.number("swiglu_limit", 7.0, above=0),
        is_stacked=True,
    )


def with_positions(fields: Fields) -> Fields:
    """Return the fields with the rotary positions that transformers takes if gpt-oss's config gives none, or no
    ``rope_theta``."""
    sections = [section for name in ("rope_parameters", "rope_scaling") if (section := fields.object(name))]
    added: dict[str, Any] = {} if sections else {"rope_parameters": dict(_YARN)}
    if not any("rope_theta" in section for section in (fields, *sections)):
        added["rope_theta"] = _THETA
    return replace(fields, values={**fields.values, **added})
