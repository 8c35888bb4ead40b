"""The mixture of experts of an HF ``config.json``, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.models.hf.fields import Fields


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that replaces the MLP in every layer, or in all layers but the first."""

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
    num_dense_layers: int = 0
    """``first_k_dense_replace``: number of first layers that have a dense MLP."""
    shared_width: int = 0
    """Intermediate size of the MLP that every token passes besides its experts: that of all shared experts together."""
    biased_sigmoid: BiasedSigmoid | None = None
    """None: the router scores experts by a softmax."""
    clamp: float | None = None
    """``swiglu_limit`` of gpt-oss, which bounds gate and value of an expert: (value + 1) · gate · sigmoid(1.702 ·
    gate). None: value · silu(gate)."""
    is_stacked: bool = False
    """Whether an HF folder has one tensor for all experts of a layer (``models/stacked_experts.py``)."""


@dataclass(frozen=True, kw_only=True)
class BiasedSigmoid:
    """The router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a sigmoid scores each expert; a bias, which no
    gradient trains, is added to the score for the choice alone."""

    num_groups: int
    top_groups: int
    """Number of groups among whose experts a token chooses: those with the largest sums of their two best scores."""
    scale: float
    """``routed_scaling_factor``: multiplies the routing weights."""


@dataclass(frozen=True, kw_only=True)
class _SigmoidDefaults:
    """Values of fields that a config leaves out, as transformers' class of the family has them."""

    num_dense_layers: int
    num_groups: int
    top_groups: int
    scale: float


_ALPHA = 1.702
"""Gain in the sigmoid of a clamped gate. Megatron's ``quick_gelu`` has no other."""
_SIGMOID = {
    "deepseek_v3": _SigmoidDefaults(num_dense_layers=3, num_groups=8, top_groups=4, scale=2.5),
    "glm4_moe": _SigmoidDefaults(num_dense_layers=1, num_groups=1, top_groups=1, scale=1.0),
}


def experts_from_data(fields: Mapping[str, Any] | None) -> Experts | None:
    """Return the experts from their ``dataclasses.asdict``."""
    if fields is None:
        return None
    router = fields["biased_sigmoid"]
    return Experts(**{**fields, "biased_sigmoid": None if router is None else BiasedSigmoid(**router)})


def read_experts(fields: Fields, num_layers: int) -> Experts | None:
    """Return the experts of a config; None for a family without.

    Raises:
        ValueError: a field is missing, out of its range, or asks for what is not supported.
    """
    family = fields.get("model_type")
    if family == "qwen3_moe":
        return _softmax_experts(fields)
    if family == "gpt_oss":
        return _clamped_experts(fields)
    return _sigmoid_experts(fields, num_layers, _SIGMOID[family]) if family in _SIGMOID else None


def _num_experts(fields: Fields) -> tuple[str, int]:
    """Return the field that gives the number of experts, and the number. transformers 5 writes it under either name."""
    name = "num_experts" if "num_experts" in fields else "num_local_experts"
    num_experts = fields.integer(name)
    if name == "num_experts" and "num_local_experts" in fields and fields.integer("num_local_experts") != num_experts:
        fields.refuse("num_local_experts", f"must be the same as num_experts={num_experts}")
    return name, num_experts


def _softmax_experts(fields: Fields) -> Experts:
    (name, num_experts), per_token = _num_experts(fields), fields.integer("num_experts_per_tok")
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


def _clamped_experts(fields: Fields) -> Experts:
    """Return the experts of gpt-oss.

    ``router_aux_loss_coef`` is not read: transformers applies it only under ``output_router_logits``.
    """
    (name, num_experts), per_token = _num_experts(fields), fields.integer("num_experts_per_tok")
    if not 2 <= per_token <= num_experts:
        fields.refuse("num_experts_per_tok", f"must be from 2 to {name}={num_experts}: a single weight is always 1")
    for alpha in ("swiglu_alpha", "hidden_act_alpha"):  # transformers' name, SGLang's name
        if fields.get(alpha) not in (None, _ALPHA):
            fields.refuse(alpha, f"only {_ALPHA} is supported")
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        ffn_hidden_size=fields.integer("intermediate_size"),
        normalized=True,
        moe_aux_loss_coef=0.0,
        clamp=fields.number("swiglu_limit", 7.0, above=0),
        is_stacked=True,
    )


def _sigmoid_experts(fields: Fields, num_layers: int, defaults: _SigmoidDefaults) -> Experts:
    num_experts, per_token = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    if not 2 <= per_token <= num_experts:
        fields.refuse("num_experts_per_tok", f"must be from 2 to n_routed_experts={num_experts}")
    for name, allowed in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        if fields.get(name) not in (None, allowed):
            fields.refuse(name, f"only {allowed!r} is supported")
    if not fields.flag("norm_topk_prob", True):
        fields.refuse("norm_topk_prob", "only true is supported: Megatron always normalises sigmoid scores")
    # 0 stands for no dense layer, and Fields.integer is for sizes.
    name, default = "first_k_dense_replace", defaults.num_dense_layers
    dense = 0 if fields.get(name) == 0 else fields.integer(name, default)
    if dense >= num_layers:
        fields.refuse("first_k_dense_replace", f"must be below num_hidden_layers={num_layers}: no layer has experts")
    width = fields.integer("moe_intermediate_size")
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        ffn_hidden_size=width,
        normalized=True,
        moe_aux_loss_coef=0.0,
        num_dense_layers=dense,
        shared_width=width * fields.integer("n_shared_experts", 1),
        biased_sigmoid=_router(fields, num_experts, per_token, defaults),
    )


def _router(fields: Fields, num_experts: int, per_token: int, defaults: _SigmoidDefaults) -> BiasedSigmoid:
    groups, top = fields.integer("n_group", defaults.num_groups), fields.integer("topk_group", defaults.top_groups)
    if num_experts % groups:
        fields.refuse("n_group", f"must divide n_routed_experts={num_experts}")
    if top > groups:
        fields.refuse("topk_group", f"must not exceed n_group={groups}")
    if top < groups and per_token != 2 * top:
        rule = (
            f"must be 2 × topk_group={top}: Megatron ranks a group by the sum of its num_experts_per_tok / topk_group "
        )
        fields.refuse("num_experts_per_tok", rule + "best experts, transformers and SGLang by that of its two best")
    scale = fields.number("routed_scaling_factor", defaults.scale, above=0)
    return BiasedSigmoid(num_groups=groups, top_groups=top, scale=scale)
